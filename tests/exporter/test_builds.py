"""Networks before they have weights: no memory, no random initialisation, timm's own structure."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import tiny
import torch
from checkpoints import of_state, seeded_state
from torch import nn

from npu_export.encoders import ENCODERS, find_encoder
from npu_export.encoders.spec import EncoderSpec, Layout
from npu_export.network import load_network, network_shapes, plan_weights
from npu_export.timm_import import import_timm
from npu_export.weights import find_weights

FULL_SIZE = tuple(encoder for encoder in ENCODERS if encoder not in tiny.FAMILIES)
PARAMETERS = {
    "vit-base": 85_798_656,
    "pe-lang-l14-448": 291_415_040,
    "convnext-base-clip": 88_222_464,
    "dinov2-small-reg4": 22_057_344,
    "aimv2-large-distilled": 309_197_824,
}
TIMM_NAMES = {
    "vit-base": "vit_base_patch16_224",
    "pe-lang-l14-448": "vit_pe_lang_large_patch14_448",
    "convnext-base-clip": "convnext_base.clip_laion2b",
    "dinov2-small-reg4": "vit_small_patch14_reg4_dinov2",
    "aimv2-large-distilled": "aimv2_large_patch14_224",
}
families = pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
full_size = pytest.mark.parametrize("encoder", FULL_SIZE, ids=lambda encoder: encoder.name)


def loaded(encoder: EncoderSpec, layout: str = "auto") -> nn.Module:
    return load_network(plan_weights(encoder, find_weights(encoder, "random:0", layout)))


def timm_network(encoder: EncoderSpec) -> nn.Module:
    """timm's network of the published name as it comes, on the meta device."""
    with torch.device("meta"):
        network: nn.Module = import_timm().create_model(TIMM_NAMES[encoder.name], pretrained=False)
        return network.eval()


def structure(network: nn.Module) -> dict[str, str]:
    """The settings of each module that computes, heads apart; GELU's two classes compute the same."""
    return {
        name: "GELU" if type(module).__name__ == "GELU" else f"{type(module).__name__}({module.extra_repr()})"
        for name, module in network.named_modules()
        if not list(module.children()) and not (name == "head" and not isinstance(network.head, nn.Sequential))
    }


def test_every_encoder_is_expected_to_be_something() -> None:
    assert {encoder.name for encoder in FULL_SIZE} == set(PARAMETERS) == set(TIMM_NAMES)


@full_size
def test_the_network_is_timms_of_the_published_name(encoder: EncoderSpec) -> None:
    expected = timm_network(encoder)
    shapes = {name: tuple(t.shape) for name, t in expected.state_dict().items()}
    if encoder.name == "vit-base":
        del shapes["head.weight"], shapes["head.bias"]
    for layout in encoder.layouts:
        assert network_shapes(layout) == shapes
        with torch.device("meta"):
            network = layout.build()
        assert type(network) is type(expected)
        if layout.name not in ("hf", "jax") or encoder.name != "vit-base":
            assert structure(network) == structure(expected)
        assert not any(module.training for module in network.modules())


@full_size
def test_the_network_has_the_published_parameters(encoder: EncoderSpec) -> None:
    with torch.device("meta"):
        network = encoder.layouts[0].build()
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == encoder.published.parameters == PARAMETERS[encoder.name]


@pytest.mark.parametrize("name", ["vit-base", "tiny-vit"])
@pytest.mark.parametrize(
    ("layout", "eps", "approximate"), [("hf", 1e-12, "none"), ("timm", 1e-6, "none"), ("jax", 1e-6, "tanh")]
)
def test_vits_norms_and_activation_are_those_of_each_publisher(
    name: str, layout: str, eps: float, approximate: str
) -> None:
    images = torch.linspace(-3, 3, 64)
    expected = nn.GELU(approximate=approximate)(images)
    for found in (known for known in find_encoder(name).layouts if known.name == layout):
        with torch.device("meta"):
            network = found.build()
        norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
        assert len(norms) == 2 * len(network.blocks) + 1
        assert {norm.eps for norm in norms} == {eps}
        assert all(torch.equal(block.mlp.act(images), expected) for block in network.blocks)


@families
def test_the_network_built_without_memory_is_the_one_built_with_it(encoder: EncoderSpec) -> None:
    for layout in encoder.layouts:
        normal = layout.build()
        assert network_shapes(layout) == {name: tuple(t.shape) for name, t in normal.state_dict().items()}
        filled = load_network(plan_weights(encoder, of_state(seeded_state(encoder, layout))))
        assert str(filled) == str(normal)
        assert [name for name, _ in filled.named_buffers()] == [name for name, _ in normal.named_buffers()]


@families
def test_loading_draws_no_random_number(encoder: EncoderSpec) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded(encoder)
    assert torch.equal(torch.get_rng_state(), before)
    encoder.layouts[0].build()  # a normal build does
    assert not torch.equal(torch.get_rng_state(), before)


def test_no_parameter_is_initialised_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    initialised: list[torch.Tensor] = []

    def normal_(tensor: torch.Tensor, *args: float, **kwargs: float) -> torch.Tensor:
        initialised.append(tensor)
        return tensor

    for name in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "_no_grad_normal_"):
        monkeypatch.setattr(nn.init, name, normal_)
    network_shapes(tiny.TINY.layouts[0])
    assert initialised
    assert all(tensor.is_meta for tensor in initialised)
    initialised.clear()
    tiny.TINY.layouts[0].build()
    assert not any(tensor.is_meta for tensor in initialised)


@pytest.mark.parametrize("layout", tiny.TINY_PE_LANG.layouts, ids=lambda layout: layout.name)
@pytest.mark.parametrize("size", [56, 84])
def test_buffers_that_the_network_computes_are_those_of_a_normal_build_bit_for_bit(layout: Layout, size: int) -> None:
    encoder = tiny.TINY_PE_LANG.at_size(size)
    (found,) = (known for known in encoder.layouts if known.name == layout.name)
    computed = dict(loaded(encoder, layout.name).named_buffers())
    normal = dict(found.build().named_buffers())
    assert set(computed) == set(normal) >= {"rope.pos_embed"}  # newer timms keep the frequencies too
    assert all(torch.equal(computed[name], tensor) for name, tensor in normal.items())
    with torch.device("meta"):  # the way that would leave them empty
        assert all(buffer.is_meta for buffer in found.build().buffers())


@pytest.mark.full
def test_the_rotary_positions_of_pe_lang_are_timms_at_full_size() -> None:
    normal = dict(import_timm().create_model(TIMM_NAMES["pe-lang-l14-448"], pretrained=False).named_buffers())
    for layout in ("meta", "timm"):
        computed = dict(loaded(find_encoder("pe-lang-l14-448"), layout).named_buffers())
        assert set(computed) == set(normal)
        assert all(torch.equal(computed[name], tensor) for name, tensor in normal.items())


class BrokenBuildError(Exception):
    pass


def test_a_build_that_fails_leaves_torch_as_it_was() -> None:
    seen: list[bool] = []

    def build(*, fail: bool) -> nn.Module:
        seen.append(nn.Linear(2, 2).weight.is_meta)
        if fail:
            raise BrokenBuildError
        return nn.Linear(2, 2)

    layout = tiny.TINY.layouts[0]
    with pytest.raises(BrokenBuildError):
        network_shapes(dataclasses.replace(layout, build=functools.partial(build, fail=True)))
    assert not nn.Linear(2, 2).weight.is_meta
    network_shapes(dataclasses.replace(layout, build=functools.partial(build, fail=False)))
    assert not nn.Linear(2, 2).weight.is_meta
    assert seen == [True, True]
