"""Every layout of every encoder: the published lists of keys at full size, and tensors there and back at a tiny one."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import tiny
import torch
from checkpoints import LAYOUT_LISTS, State, of_shapes, of_state, published_shapes, seeded_state

import npu_export.encoders
from npu_export.encoders import ENCODERS, find_encoder
from npu_export.encoders.spec import EncoderSpec, Layout
from npu_export.errors import CheckpointError
from npu_export.keymap import Rule, Shapes, invert, plan_keymap, read_mapped, source_shapes
from npu_export.network import load_network, network_shapes, plan_weights, state_sha256
from npu_export.operations import FoldPosition, Zeros
from npu_export.recognise import candidates, nearest

TEXT_TOWER = re.compile(
    r"positional_embedding|text_projection|token_embedding\.weight|logit_scale|ln_final\..*|transformer\.resblocks\..*"
)
PUBLISHED = {
    "aimv2.apple": ("aimv2-large-distilled", "apple", r"(?!)"),
    "aimv2.hf": ("aimv2-large-distilled", "hf", r"(?!)"),
    "convnext.openclip": ("convnext-base-clip", "openclip", TEXT_TOWER.pattern),
    "convnext.timm": ("convnext-base-clip", "timm", r"(?!)"),
    "dinov2.hf": ("dinov2-small-reg4", "hf", r"embeddings\.mask_token"),
    "dinov2.meta": ("dinov2-small-reg4", "meta", r"mask_token"),
    "dinov2.timm": ("dinov2-small-reg4", "timm", r"(?!)"),
    "pe-lang.meta": ("pe-lang-l14-448", "meta", r"(?!)"),
    "pe-lang.timm": ("pe-lang-l14-448", "timm", r"(?!)"),
    "vit.hf": ("vit-base", "hf", r"classifier\.(weight|bias)"),
    "vit.hf-model": ("vit-base", "hf", r"pooler\.dense\.(weight|bias)"),
    "vit.jax": ("vit-base", "jax", r"head/(kernel|bias)"),
    "vit.timm": ("vit-base", "timm", r"head\.(weight|bias)"),
}
"""Encoder and layout of each published list, and the keys of it that are dropped."""
TINY_LAYOUTS = [
    pytest.param(encoder, layout, id=f"{encoder.name}-{layout.name}-{index}")
    for encoder in tiny.FAMILIES
    for index, layout in enumerate(encoder.layouts)
]


@functools.cache
def shapes_of(encoder_name: str) -> Shapes:
    return network_shapes(find_encoder(encoder_name).layouts[0])


def folds(layout: Layout) -> bool:
    return any(isinstance(rule, Rule) and isinstance(rule.operation, FoldPosition) for rule in layout.rules)


def test_every_published_list_of_keys_is_expected_to_be_something() -> None:
    assert {path.stem for path in LAYOUT_LISTS.glob("*.tsv")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_keys_are_recognised_and_fill_the_network_wholly(name: str) -> None:
    encoder_name, layout, dropped = PUBLISHED[name]
    shapes = published_shapes(f"{name}.tsv")
    plan = plan_weights(find_encoder(encoder_name), of_shapes(shapes))
    assert plan.layout.name == layout
    assert plan.keymap.complete
    assert set(plan.keymap.dropped) == {key for key in shapes if re.fullmatch(dropped, key)}
    assert sorted([*plan.keymap.sources(), *plan.keymap.dropped]) == sorted(shapes)
    assert {target for move in plan.keymap.moves for target in move.targets} == set(shapes_of(encoder_name))
    assert plan.parameters == plan.encoder.published.parameters
    assert f"layout {layout} " in plan.why


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_published_key_can_be_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder_name, layout, dropped = PUBLISHED[name]
    encoder, target, shapes = find_encoder(encoder_name), shapes_of(encoder_name), published_shapes(f"{name}.tsv")
    kinds = {re.sub(r"(\.|encoderblock_)[0-9]+", "#", key): key for key in shapes if not re.fullmatch(dropped, key)}
    assert len(kinds) > 10
    for key in kinds.values():
        rest = {other: shape for other, shape in shapes.items() if other != key}
        near = nearest(candidates(encoder.layouts, rest, target))
        assert near.layout.name == layout
        assert near.keymap.missing == {key: shapes[key]}
    monkeypatch.setattr(npu_export.encoders, "ENCODERS", (encoder,))
    with pytest.raises(CheckpointError, match=f"does not fit {encoder_name}") as raised:
        plan_weights(encoder, of_shapes(rest))
    assert raised.value.got == f"missing     {key} {list(shapes[key])}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_key_that_is_dropped_need_not_be_there(name: str) -> None:
    encoder_name, _, dropped = PUBLISHED[name]
    shapes = {key: s for key, s in published_shapes(f"{name}.tsv").items() if not re.fullmatch(dropped, key)}
    found = candidates(find_encoder(encoder_name).layouts, shapes, shapes_of(encoder_name))
    assert [candidate.layout.name for candidate in found if candidate.keymap.complete] == [PUBLISHED[name][1]]


@pytest.mark.parametrize("encoder", [*ENCODERS, *tiny.FAMILIES], ids=lambda encoder: encoder.name)
def test_no_two_layouts_of_an_encoder_take_the_same_file(encoder: EncoderSpec) -> None:
    target = network_shapes(encoder.layouts[0])
    for layout in encoder.layouts:
        found = candidates(encoder.layouts, source_shapes(layout.rules, target), target)
        assert [c.layout.rules for c in found if c.keymap.complete] == [layout.rules]


@pytest.mark.parametrize(("encoder", "layout"), TINY_LAYOUTS)
def test_every_tensor_of_a_layout_comes_back_bit_for_bit(encoder: EncoderSpec, layout: Layout) -> None:
    state = seeded_state(encoder, layout)
    plan = plan_weights(encoder, of_state(state))
    assert plan.layout.rules == layout.rules
    mapped = dict(read_mapped(plan.keymap, state.__getitem__))
    if folds(layout):
        with pytest.raises(ValueError, match="loses information"):
            invert(layout.rules)
        (move,) = (m for m in plan.keymap.moves if isinstance(m.rule.operation, FoldPosition))
        cls, positions = (state[key] for key in move.sources)
        assert torch.equal(mapped["cls_token"], cls + positions[:, :1])
        assert torch.equal(mapped["pos_embed"], positions[:, 1:])
        # The rest has an inverse; the two that were folded are compared above.
        layout = dataclasses.replace(layout, rules=tuple(rule for rule in layout.rules if rule != move.rule))
        mapped = {name: tensor for name, tensor in mapped.items() if name not in move.targets}
        state = {key: tensor for key, tensor in state.items() if key not in move.sources}
    back = from_network(mapped, layout)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def from_network(mapped: State, layout: Layout) -> State:
    """A network's tensors as a layout holds them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in mapped.items()}
    plan = plan_keymap(invert(layout.rules), shapes, source_shapes(layout.rules, shapes))
    return dict(read_mapped(plan, mapped.__getitem__))


@pytest.mark.parametrize(
    "encoder", [e for e in tiny.FAMILIES if e is not tiny.TINY_DINOV2], ids=lambda encoder: encoder.name
)
def test_all_layouts_of_an_encoder_give_the_same_state(encoder: EncoderSpec) -> None:
    (timm,) = (layout for layout in encoder.layouts if layout.name == "timm")
    state = seeded_state(encoder, timm)
    for rule in (rule for layout in encoder.layouts for rule in layout.rules if isinstance(rule, Rule)):
        if isinstance(rule.operation, Zeros):  # a layout that cannot hold this tensor, since it is zero
            state.update({name: torch.zeros_like(state[name]) for name in rule.targets})
    expected = state_digest(encoder, state, timm)
    assert len(encoder.layouts) > 1
    for layout in encoder.layouts:
        held = from_network(state, layout)
        assert state_digest(encoder, held, layout) == expected
        key = next(key for key in held if key.endswith(("pos_embed", "pos_embedding", "weight", "position_embeddings")))
        held[key] = held[key].flip(-1)
        assert state_digest(encoder, held, layout) != expected


@pytest.mark.parametrize("layout", [la for la in tiny.TINY_DINOV2.layouts if folds(la)], ids=lambda la: la.about)
def test_a_layout_with_a_position_of_the_cls_token_gives_the_state_of_one_that_holds_the_sum(layout: Layout) -> None:
    encoder = tiny.TINY_DINOV2
    timm = seeded_state(encoder, encoder.layouts[0])
    (fold,) = (rule for rule in layout.rules if isinstance(rule, Rule) and isinstance(rule.operation, FoldPosition))
    rest = dataclasses.replace(layout, rules=tuple(rule for rule in layout.rules if rule != fold))
    state = from_network({key: tensor for key, tensor in timm.items() if key not in fold.targets}, rest)
    cls, positions = fold.sources
    own, both = torch.full((1, 1, 64), 0.25), torch.full((1, 1, 64), 0.5)
    state[cls], state[positions] = both - own, torch.cat([own, timm["pos_embed"]], dim=1)
    timm["cls_token"] = both
    assert state_digest(encoder, state, layout) == state_digest(encoder, timm, encoder.layouts[0])


def state_digest(encoder: EncoderSpec, state: State, layout: Layout) -> str:
    """Of the network that a file in this layout fills."""
    plan = plan_weights(encoder, of_state(state))
    assert plan.layout.rules == layout.rules
    return state_sha256(load_network(plan))


@pytest.mark.parametrize(("encoder", "layout"), TINY_LAYOUTS)
def test_parts_with_like_shapes_have_the_names_of_their_places(encoder: EncoderSpec, layout: Layout) -> None:
    """What a round trip cannot see: two sources of one shape that are exchanged both ways."""
    plan = plan_keymap(layout.rules, source_shapes(layout.rules, shapes_of(encoder.name)), shapes_of(encoder.name))
    fused = [move for move in plan.moves if "attn.qkv" in move.targets[0] and len(move.sources) > 1]
    parts = [[re.split(r"[./]", source)[-2][0] for source in move.sources] for move in fused]
    assert all(part == ["q", "k", "v"] for part in parts)
    assert bool(fused) == (layout.name in ("hf", "jax"))
    source_of = {target: source for move in plan.moves for source, target in zip(move.sources, move.targets)}
    if encoder is tiny.TINY_AIMV2:
        mlp = tuple(source_of[f"blocks.1.mlp.{part}.weight"].split(".")[-2] for part in ("fc1_g", "fc1_x", "fc2"))
        assert mlp in (("gate_proj", "up_proj", "down_proj"), ("fc1", "fc3", "fc2"), ("fc1_g", "fc1_x", "fc2"))


@pytest.mark.parametrize("layout", [la for la in tiny.TINY.layouts if la.name == "jax"], ids=lambda la: la.about)
def test_googles_kernels_compute_what_they_do_in_flax(layout: Layout) -> None:
    state = seeded_state(tiny.TINY, layout)
    network = load_network(plan_weights(tiny.TINY, of_state(state)))
    block = re.compile(r"Transformer/encoderblock_1/(?:\w+/)?(query|key|value|out|Dense_.)/(kernel|bias)")
    found = {match.groups(): tensor for key, tensor in state.items() if (match := block.fullmatch(key))}
    kernel, bias = ({part: t for (part, leaf), t in found.items() if leaf == kind} for kind in ("kernel", "bias"))
    tokens = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    attention = network.blocks[1].attn
    # flax.linen.MultiHeadDotProductAttention: DenseGeneral from [D] to [heads, head] and back
    expected = [torch.einsum("nd,dhk->nhk", tokens, kernel[p]) + bias[p] for p in ("query", "key", "value")]
    got = attention.qkv(tokens).reshape(3, 3, 4, 16).unbind(1)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected))
    out = torch.einsum("nhk,hkd->nd", tokens.reshape(3, 4, 16), kernel["out"]) + bias["out"]
    assert torch.allclose(attention.proj(tokens), out, atol=1e-5)
    assert torch.equal(network.blocks[1].mlp.fc1.weight.T, kernel["Dense_0"])
    assert torch.equal(network.blocks[1].mlp.fc2.weight.T, kernel["Dense_1"])
    # flax.linen.Conv: kernels [height, width, in, out], no flip
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    patch = torch.einsum("chw,hwcd->d", images[0, :, 8:16, :8], state["embedding/kernel"]) + state["embedding/bias"]
    assert torch.allclose(network.patch_embed(images)[0, 4], patch, atol=1e-5)
