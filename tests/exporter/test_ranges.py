"""What float16 does not hold of a network is measured, refused by name, or kept in float32."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from watching import Watching

import npu_export.pipeline as pipeline
import npu_runtime
from npu_export.encoders.spec import EncoderSpec
from npu_export.errors import PrecisionError
from npu_export.network import load_network, plan_weights
from npu_export.pipeline import export
from npu_export.plan import make_request, plan_export
from npu_export.precision import castable_modules, in_precision
from npu_export.proof.headroom import LEAST, MARGIN, find_faults, measure_plan, settle_kept
from npu_export.proof.ranges import INSIDE, Spelling, count_casts, measure_modules
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import ModuleRange
from npu_runtime.artifact.store import open_artifact
from npu_runtime.errors import InputError, UsageError
from npu_runtime.parity.inputs import seeded_images
from npu_runtime.parity.verify import measure_parity
from npu_runtime.steps import Silent

Change = Callable[[dict[str, torch.Tensor]], object]
BOTH = Spelling(onnx=True, opset=18)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[EncoderSpec, Change], str]:
    """A checkpoint of an encoder's seeded weights with some of them changed."""

    def write(encoder: EncoderSpec, change: Change) -> str:
        seeded = find_weights(encoder, "random:0")
        state = {name: torch.as_tensor(seeded.read(name)).clone() for name in seeded.shapes}
        change(state)
        save_file(state, tmp_path / "changed.safetensors")
        return str(tmp_path / "changed.safetensors")

    return write


def massive_activation(state: dict[str, torch.Tensor]) -> None:
    """One channel of the residual stream of a ViT is 1e5 from its first block on."""
    state["encoder.layer.0.output.dense.bias"][7] = 1e5


def small_output(state: dict[str, torch.Tensor]) -> None:
    """The final norm of a ViT gives numbers around 1e-6."""
    state["layernorm.weight"] *= 1e-6
    state["layernorm.bias"] *= 1e-6


def module_of(encoder: EncoderSpec, weights: str = "random:0") -> nn.Module:
    return encoder.with_outputs(load_network(plan_weights(encoder, find_weights(encoder, weights))))


def measured(
    module: nn.Module, encoder: EncoderSpec = tiny.TINY, spelling: Spelling = BOTH
) -> Mapping[str, ModuleRange]:
    spec = encoder.inputs[0]
    images = seeded_images((0, 1), spec.of_batch(1)[1:], spec.dtype)
    return {found.module: found for found in measure_modules(module, spec, images, spelling)}


# Measuring


@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_every_module_with_weights_is_measured_in_the_order_in_which_it_runs(encoder: EncoderSpec) -> None:
    module = module_of(encoder)
    found = measured(module, encoder)
    assert [name for name in found if name] == list(castable_modules(module.network))
    for range_ in found.values():
        assert range_.headroom == 65504 / range_.largest.value
        assert 100 < range_.headroom < 1e6


def test_measuring_changes_neither_the_network_nor_what_it_gives() -> None:
    module, images = module_of(tiny.TINY), torch.from_numpy(seeded_images((3,), (3, 32, 32)))
    with torch.inference_mode():
        before = module(images)
        measured(module)
        after = module(images)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


def test_the_largest_value_is_that_of_the_operator_that_gives_it() -> None:
    module = module_of(tiny.TINY)
    block = module.network.blocks[1]
    block.mlp.fc1.bias.data[5] = 500.0
    seen: list[float] = []
    hook = block.mlp.fc1.register_forward_hook(lambda *arguments: seen.append(float(arguments[2].abs().max())))
    with torch.inference_mode():
        module(torch.from_numpy(seeded_images((0, 1), (3, 32, 32))))
    hook.remove()
    found = measured(module, spelling=Spelling(onnx=False, opset=18))["blocks.1"]
    assert found.largest.operator == "linear"
    assert found.largest.value == pytest.approx(max(seen), rel=1e-5)
    assert found.largest.value > 500


def test_what_runs_between_modules_is_counted_to_the_one_before() -> None:
    module = module_of(tiny.TINY)
    module.network.pos_embed.data[0, 3, 3] = 900.0
    found = measured(module)
    assert found["patch_embed"].largest.operator == "add"
    assert found["patch_embed"].largest.value == pytest.approx(900, rel=0.05)
    assert found[""].largest.operator == "parameter pos_embed"


def test_a_massive_activation_is_found_in_every_module_that_receives_it(
    changed: Callable[[EncoderSpec, Change], str],
) -> None:
    found = measured(module_of(tiny.TINY, changed(tiny.TINY, massive_activation)))
    assert {name for name, range_ in found.items() if range_.headroom < 1} == {"blocks.0", "blocks.1", "norm"}


class SpelledRmsNorm(nn.Module):
    """RMSNorm from single operators, in the type of its input or in float32."""

    def __init__(self, weight: torch.Tensor, widens: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.widens = widens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if self.widens else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return normed.type_as(x) * self.weight


def spell_norms(network: nn.Module, widens: bool) -> nn.Module:
    for block in network.blocks:
        for name in ("norm1", "norm2"):
            setattr(block, name, SpelledRmsNorm(getattr(block, name).weight.data, widens))
    return tiny.TINY_AIMV2.with_outputs(network)


SPELLED = {
    widens: dataclasses.replace(tiny.TINY_AIMV2, with_outputs=functools.partial(spell_norms, widens=widens))
    for widens in (False, True)
}
"""Whether it widens -> AIMv2 with norms of single operators."""


def three_hundred(state: dict[str, torch.Tensor]) -> None:
    """A channel of AIMv2's residual stream is 300, whose square float16 does not hold."""
    state["pos_embed" if "pos_embed" in state else "embeddings.position_embedding.weight"].select(-1, 7).fill_(300)


def test_a_square_that_a_norm_computes_in_float16_overflows_and_one_in_float32_does_not(
    changed: Callable[[EncoderSpec, Change], str],
) -> None:
    weights = changed(tiny.TINY_AIMV2, three_hundred)
    narrow = measured(module_of(SPELLED[False], weights), tiny.TINY_AIMV2)["blocks.0"]
    assert (narrow.largest.operator, narrow.headroom < 1) == ("pow", True)
    assert narrow.largest.value == pytest.approx(300**2, rel=0.05)
    for encoder in (SPELLED[True], tiny.TINY_AIMV2):  # torch's own RMSNorm computes in float32
        wide = measured(module_of(encoder, weights), encoder)["blocks.0"]
        assert wide.headroom > 200
        assert wide.inside is not None
        assert (wide.inside.operator, wide.inside.value) == ("pow", narrow.largest.value)


def test_scores_overflow_where_a_graph_spells_them_in_float16_and_not_in_torchs_kernel() -> None:
    module = module_of(tiny.TINY)
    module.network.blocks[1].attn.qkv.weight.data[:128] *= 300
    assert measured(module)["blocks.1"].largest.operator == "scores of attention"
    assert measured(module)["blocks.1"].headroom < 1
    kernel = measured(module, spelling=Spelling(onnx=False, opset=18))["blocks.1"]
    assert kernel.headroom > MARGIN
    assert kernel.inside is not None
    assert kernel.inside.operator == "scores of attention before they are scaled"
    assert kernel.inside.value == pytest.approx(4 * measured(module)["blocks.1"].largest.value, rel=1e-5)


@pytest.mark.parametrize(
    ("spelling", "operator"),
    [(BOTH, "x (1 + erf) of gelu"), (Spelling(True, 20), "gelu"), (Spelling(False, 18), "gelu")],
)
def test_gelu_doubles_its_input_where_a_graph_spells_it_out(spelling: Spelling, operator: str) -> None:
    module = module_of(tiny.TINY)
    module.network.blocks[0].mlp.fc1.weight.data[3] *= 1e4
    found = measured(module, spelling=spelling)["blocks.0"]
    assert (found.largest.operator in (operator, "linear"), found.largest.operator == "x (1 + erf) of gelu") == (
        True,
        operator == "x (1 + erf) of gelu",
    )


def test_the_cube_of_tanh_gelu_is_recorded_and_not_held_against_float16() -> None:
    module = module_of(tiny.TINY)
    module.network.blocks[0].mlp.act = nn.GELU(approximate="tanh")
    module.network.blocks[0].mlp.fc1.bias.data[3] = 100
    found = measured(module)["blocks.0"]
    assert found.headroom > 100
    assert found.inside is not None
    assert found.inside.operator == "cube of gelu"
    assert found.inside.value == pytest.approx(1e6, rel=0.2)


def test_infinities_of_masks_are_left_out() -> None:
    class Masked(nn.Module):
        def __init__(self, norm: nn.Module, mask: float) -> None:
            super().__init__()
            self.norm, self.mask = norm, mask

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x + torch.full_like(x, self.mask).tril(-1), -1) + self.norm(x)

    for mask in (-float("inf"), torch.finfo(torch.float32).min):
        module = module_of(tiny.TINY)
        module.network.norm = Masked(module.network.norm, mask)
        assert measured(module)["norm"].headroom > 100


def test_numbers_too_small_for_float16_are_found_where_they_leave_a_module(
    changed: Callable[[EncoderSpec, Change], str],
) -> None:
    found = measured(module_of(tiny.TINY, changed(tiny.TINY, small_output)))
    smallest = found["norm"].smallest
    assert smallest is not None
    assert smallest.operator == "output"
    assert smallest.value == pytest.approx(1e-6, rel=0.2)
    assert {name for name, r in found.items() if r.smallest and r.smallest.value < LEAST} == {"norm"}


def test_small_numbers_that_a_norm_makes_large_again_are_found_where_it_computes_in_float16() -> None:
    def small(widens: bool) -> ModuleRange:
        module = module_of(SPELLED[widens])
        module.network.blocks[0].norm1.weight.data.mul_(1)
        module.network.patch_embed.norm.weight.data.mul_(2e-3)
        module.network.pos_embed.data.mul_(2e-3)
        return measured(module, tiny.TINY_AIMV2)["blocks.0"]

    narrow, wide = small(False).smallest, small(True).smallest
    assert narrow is not None
    assert wide is not None
    assert (narrow.operator, narrow.value < LEAST) == ("what rsqrt is given", True)
    assert wide.value > LEAST


def test_small_weights_outside_of_the_blocks_lose_nothing_that_counts() -> None:
    module = module_of(tiny.TINY)
    module.network.cls_token.data.mul_(1e-7)
    assert all(found.smallest is None or found.smallest.value > LEAST for found in measured(module).values())
    assert measured(module)[""].smallest is None


def test_graphs_hold_in_float16_what_the_table_says_and_nothing_else_of_it() -> None:
    assert set(INSIDE) == {"aten::native_layer_norm", "aten::addmm", "aten::gelu"}
    from npu_export.onnx import export_graph

    for encoder in tiny.FAMILIES:
        module = in_precision(module_of(encoder), "fp16")
        graph = export_graph(module, encoder.inputs[0], encoder.outputs, 1, 18)[0].graph
        types: dict[str, set[str]] = {}
        for node in graph:
            types.setdefault(node.op_type, set()).add(str(node.outputs[0].dtype))
            if node.op_type == "LayerNormalization":
                assert node.attributes["stash_type"].as_int() == onnx.TensorProto.FLOAT
        assert types["MatMul"] == {"FLOAT16"}
        assert types.get("Softmax", {"FLOAT"}) == types.get("Pow", {"FLOAT"}) == {"FLOAT"}
        assert types.get("Erf", {"FLOAT16"}) == {"FLOAT16"}


# Refusing


def test_what_would_overflow_is_refused_by_name_before_anything_is_frozen(
    changed: Callable[[EncoderSpec, Change], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = changed(tiny.TINY, massive_activation)
    monkeypatch.setattr(pipeline, "_freeze_torchscript", lambda *_: pytest.fail("it was frozen"))
    with pytest.raises(PrecisionError, match="float16 does not hold") as raised:
        export("tiny-vit", weights=weights, precision="fp16", output=tmp_path / "a" / "out")
    assert raised.value.exit_code == 1
    assert raised.value.where == "tiny-vit"
    lines = str(raised.value.got).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["blocks.0", "blocks.1", "norm"]
    assert all("headroom 0.66" in line or "headroom 0.65" in line for line in lines), lines
    assert lines[2] == "norm: 100,002 by input, headroom 0.66"
    assert "--keep-fp32 auto" in str(raised.value.hint)
    assert list((tmp_path / "a").iterdir()) == []


def test_without_the_refusal_it_would_have_been_no_number_at_all(
    changed: Callable[[EncoderSpec, Change], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = changed(tiny.TINY, massive_activation)
    monkeypatch.setattr(pipeline, "check_headroom", lambda *_: None)
    with pytest.raises(PrecisionError, match="overflows in this precision") as raised:
        export("tiny-vit", weights=weights, precision="fp16", formats=("torchscript",), output=tmp_path / "out")
    assert "nan" in str(raised.value.got).lower()


@pytest.mark.parametrize(("precision", "formats"), [("fp32", ("onnx",)), ("bf16", ("torchscript",))])
def test_other_precisions_hold_it_and_are_not_measured(
    precision: str, formats: Sequence[str], changed: Callable[[EncoderSpec, Change], str], tmp_path: Path
) -> None:
    watch = Watching()
    output = export(
        "tiny-vit",
        weights=changed(tiny.TINY, massive_activation),
        precision=precision,
        formats=formats,
        output=tmp_path / "out",
        steps=watch,
    )
    manifest = open_artifact(output).manifest
    assert (manifest.ranges, manifest.keep_fp32) == (None, ())
    assert "record the reference" in watch.steps
    assert "measure the ranges" not in watch.steps


def test_names_that_leave_something_out_are_refused_with_the_rest(
    changed: Callable[[EncoderSpec, Change], str], tmp_path: Path
) -> None:
    weights = changed(tiny.TINY, massive_activation)
    keep = ("blocks.0", "norm")
    with pytest.raises(PrecisionError, match="beside what is kept in float32") as raised:
        export("tiny-vit", weights=weights, precision="fp16", keep_fp32=keep, output=tmp_path / "a" / "out")
    assert [line.partition(":")[0] for line in str(raised.value.got).splitlines()] == ["blocks.1"]


def test_what_cannot_be_kept_is_refused_whatever_is_kept(
    changed: Callable[[EncoderSpec, Change], str], tmp_path: Path
) -> None:
    def large_positions(state: dict[str, torch.Tensor]) -> None:
        state["embeddings.position_embeddings"][0, 3, 3] = 1e5

    weights = changed(tiny.TINY, large_positions)
    with pytest.raises(PrecisionError) as raised:
        export("tiny-vit", weights=weights, precision="fp16", keep_fp32="auto", output=tmp_path / "a" / "out")
    assert str(raised.value.got) == "outside of the blocks: 100,000 by parameter pos_embed, headroom 0.66"
    assert "cannot be kept" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("arguments", "message", "got"),
    [
        ({"precision": "fp32", "keep_fp32": "auto"}, "nothing to keep", "auto"),
        ({"precision": "fp32", "keep_fp32": ["blocks.0"]}, "nothing to keep", "blocks.0"),
        ({"precision": "bf16", "keep_fp32": "auto"}, "bfloat16 holds whatever float32 does", "auto in bf16"),
        ({"precision": "fp32", "images": "a.png"}, "fp16 alone", "fp32 and a.png"),
        ({"precision": "bf16", "images": ["a.png"]}, "fp16 alone", "bf16 and a.png"),
    ],
)
def test_what_has_no_meaning_in_a_precision_is_refused(arguments: dict[str, Any], message: str, got: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        make_request("tiny-vit", **arguments)
    assert raised.value.got == got


def test_a_module_that_does_not_exist_is_refused_with_the_choices_before_weights_are_read(tmp_path: Path) -> None:
    request = make_request("tiny-vit", precision="fp16", keep_fp32=["blocks.9", "auto"], output=tmp_path / "out")
    with pytest.raises(UsageError, match="no such module") as raised:
        plan_export(request, "random:0")
    assert raised.value.got == "blocks.9"
    assert set(str(raised.value.expected).split(", ")) == set(castable_modules(module_of(tiny.TINY).network))


# Keeping


def exported(weights: str, output: Path, watch: Watching | None = None, **options: Any) -> Path:
    options = {"keep_fp32": "auto", **options}
    return export("tiny-vit", weights=weights, precision="fp16", output=output, steps=watch, **options)


def test_auto_keeps_exactly_what_would_overflow_and_the_programs_agree_with_the_reference(
    changed: Callable[[EncoderSpec, Change], str], tmp_path: Path
) -> None:
    watch = Watching()
    output = exported(changed(tiny.TINY, massive_activation), tmp_path / "out", watch, batch=(1, 4))
    artifact = open_artifact(output)
    assert artifact.manifest.keep_fp32 == ("blocks.0", "blocks.1", "norm")
    for backend in ("torchscript", "onnxruntime"):
        for step in measure_parity(artifact, backend=backend):
            assert step.status == "passed", step.reason
    images = seeded_images((7, 8), (3, 32, 32))
    with npu_runtime.load(output, backend="eager") as eager, npu_runtime.load(output, backend="torchscript") as frozen:
        expected, got = eager.run(images), frozen.run(images)
    for name, array in got.items():
        assert np.isfinite(array).all()
        assert np.array_equal(array, expected[name])
    (cost,) = [text for text in watch.details if "conversions" in text]
    kept = module_of(tiny.TINY).network
    extra = 2 * sum(p.numel() for name in artifact.manifest.keep_fp32 for p in kept.get_submodule(name).parameters())
    assert (
        cost == f"blocks.{{0-1}} (2), norm: {extra / 1e6:,.1f} MB more in each format, -1 conversions of type in a call"
    )


def test_the_manifest_holds_the_ranges_and_what_they_were_measured_on(
    changed: Callable[[EncoderSpec, Change], str], tmp_path: Path, photographs: Path
) -> None:
    weights = changed(tiny.TINY, massive_activation)
    output = exported(weights, tmp_path / "out", formats=("torchscript",), images=[photographs])
    ranges = open_artifact(output).manifest.ranges
    assert ranges is not None
    assert (ranges.seeds, ranges.images, ranges.margin, ranges.least) == ((0, 1, 2, 3), 2, MARGIN, LEAST)
    assert [found.module for found in ranges.modules] == ["patch_embed", "blocks.0", "blocks.1", "norm", ""]
    assert ranges.nearest().headroom == min(found.headroom for found in ranges.modules) < 1
    assert list(find_faults(ranges)) == ["blocks.0", "blocks.1", "norm"]


def test_what_loses_its_small_values_is_refused_and_auto_keeps_it(
    changed: Callable[[EncoderSpec, Change], str], tmp_path: Path
) -> None:
    weights = changed(tiny.TINY, small_output)
    with pytest.raises(PrecisionError) as raised:
        exported(weights, tmp_path / "out", keep_fp32=())
    assert str(raised.value.got).startswith("norm: a root mean square of 9.7e-07 by output")
    assert "\n" not in str(raised.value.got)
    output = exported(weights, tmp_path / "out")
    assert open_artifact(output).manifest.keep_fp32 == ("norm",)


def test_a_square_that_a_graph_computes_in_float16_is_kept_and_gives_numbers(
    changed: Callable[[EncoderSpec, Change], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = changed(tiny.TINY_AIMV2, three_hundred)
    options: dict[str, Any] = {"weights": weights, "precision": "fp16", "formats": ("onnx",)}
    with pytest.raises(PrecisionError) as raised:
        export(SPELLED[False], **options, output=tmp_path / "refused")
    assert all("by pow, headroom 0.7" in line for line in str(raised.value.got).splitlines())
    output = export(SPELLED[False], **options, keep_fp32="auto", output=tmp_path / "out")
    assert open_artifact(output).manifest.keep_fp32 == ("blocks.0", "blocks.1")
    # The network's own norms compute it in float32: nothing is refused, nothing kept, and parity holds.
    for encoder in (SPELLED[True], tiny.TINY_AIMV2):
        manifest = open_artifact(export(encoder, **options, output=tmp_path / "own", force=True)).manifest
        assert manifest.keep_fp32 == ()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_named_modules_are_kept_though_nothing_overflows(precision: str, tmp_path: Path) -> None:
    output = export(
        "tiny-convnext",
        weights="random:0",
        precision=precision,
        formats=("torchscript",),
        keep_fp32=["head", "stages.2.blocks.0"],
        probes=True,
        output=tmp_path / "out",
    )
    artifact = open_artifact(output)
    assert set(artifact.manifest.keep_fp32) == {"stages.2.blocks.0", "head"}
    images = seeded_images((7,), (3, 64, 64))
    with npu_runtime.load(output, backend="eager") as eager, npu_runtime.load(output) as frozen:
        assert np.array_equal(eager(images), frozen(images))


def test_planned_sizes_count_what_is_kept(tmp_path: Path) -> None:
    output = export(
        "tiny-vit", weights="random:0", precision="fp16", keep_fp32=["blocks.1"], batch=(1,), output=tmp_path / "out"
    )
    request = make_request("tiny-vit", precision="fp16", keep_fp32=["blocks.1"], output=tmp_path / "other")
    plan = plan_export(request, "random:0")
    kept = sum(p.numel() for p in module_of(tiny.TINY).network.blocks[1].parameters())
    assert plan.kept_nbytes() == 2 * kept
    for name in ("model.ts", "weights.onnx.data"):
        assert plan.sizes()[name] == 2 * tiny.TINY.published.parameters + 2 * kept
        assert abs((output / name).stat().st_size - plan.sizes()[name]) < 128 << 10


@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_conversions_are_counted_without_running_anything(encoder: EncoderSpec) -> None:
    kept = list(castable_modules(module_of(encoder).network))[1:2]
    without = count_casts(module_of(encoder), encoder.inputs[0], torch.float16)
    assert count_casts(in_precision(module_of(encoder), "fp16"), encoder.inputs[0]) == without
    widened = {"tiny-pe-lang": 2, "tiny-aimv2": -2}  # AIMv2's norms cast to float32 and back as it is
    assert count_casts(in_precision(module_of(encoder), "fp16", kept), encoder.inputs[0]) - without == widened.get(
        encoder.name, 2
    )


# Images


def test_images_of_the_user_are_measured_too(changed: Callable[[EncoderSpec, Change], str], tmp_path: Path) -> None:
    def sums_an_image(state: dict[str, torch.Tensor]) -> None:
        state["embeddings.patch_embeddings.projection.weight"][3] = 200.0

    weights = changed(tiny.TINY, sums_an_image)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    largest = []
    for images in ((), (tmp_path / "white.png",)):
        request = make_request("tiny-vit", precision="fp16", images=images, output=tmp_path / "out")
        ranges = measure_plan(plan_export(request, weights), Silent())
        assert ranges.images == len(images)
        largest.append(ranges.modules[0].largest.value)
    assert largest[1] == pytest.approx(200 * 3 * 8 * 8, rel=0.01)  # white is 1 in every channel
    assert largest[0] < largest[1] / 2
    request = make_request("tiny-vit", precision="fp16", keep_fp32="auto", images=images, output=tmp_path / "out")
    plan = plan_export(request, weights)
    assert "patch_embed" in settle_kept(plan, ranges).keep_fp32


def test_images_that_do_not_exist_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    request = make_request("tiny-vit", precision="fp16", images=tmp_path / "no.png", output=tmp_path / "out")
    with pytest.raises(InputError, match="no such image"):
        plan_export(request, "random:0")
