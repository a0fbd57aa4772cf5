from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from checkpoints import State, of_shapes, of_state, published_shapes, seeded_state, under

import npu_export.encoders
from npu_export.checkpoint import open_checkpoint
from npu_export.encoders import ENCODERS, find_encoder
from npu_export.encoders.spec import EncoderSpec
from npu_export.errors import CheckpointError
from npu_export.keymap import read_mapped
from npu_export.network import WeightsPlan, plan_weights
from npu_runtime.errors import UsageError

FULL_SIZE = tuple(encoder for encoder in ENCODERS if encoder not in tiny.FAMILIES)
CONTAINERS = ("state_dict/", "model/", "weights/", "ema/", "model_ema/")
PREFIXES = ("module.", "_orig_mod.", "visual.", "vision_model.", "image_encoder.")
families = pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)


@pytest.fixture(autouse=True)
def only_tiny_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal tries every encoder's layouts: leave out those of full size, for time."""
    monkeypatch.setattr(npu_export.encoders, "ENCODERS", tiny.FAMILIES)


def hub_state(encoder: EncoderSpec) -> State:
    return seeded_state(encoder, encoder.layouts[0])


def mapped(plan: WeightsPlan) -> State:
    with plan.checkpoint.tensors() as read:
        return dict(read_mapped(plan.keymap, read))


def assert_same(got: State, expected: State) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def refused(encoder: EncoderSpec, state: State, **options: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as raised:
        plan_weights(encoder, of_state(state), **options)  # type: ignore[arg-type]
    return raised.value


NESTED = ("module._orig_mod.visual.", "state_dict/module.", "model/model_ema/module.")
EVERY_PREFIX = [(tiny.TINY_PE_LANG, prefix) for prefix in ("", *CONTAINERS, *PREFIXES, *NESTED)]


@pytest.mark.parametrize(
    ("encoder", "prefix"),
    [*EVERY_PREFIX, *((encoder, NESTED[0]) for encoder in tiny.FAMILIES if encoder is not tiny.TINY_PE_LANG)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_network_is_the_same_under_every_prefix_in_any_order_of_keys(encoder: EncoderSpec, prefix: str) -> None:
    state = hub_state(encoder)
    keys = list(under(prefix, state).items())
    random.Random(prefix).shuffle(keys)
    plan = plan_weights(encoder, of_state(dict(keys)))
    assert plan.prefix == prefix
    again = plan_weights(encoder, plan.checkpoint, plan.layout.name, prefix=plan.prefix, resample=True)
    assert again.keymap == plan.keymap  # as an artifact records it
    assert plan.keymap.dropped == {}
    assert_same(mapped(plan), mapped(plan_weights(encoder, of_state(state))))


@pytest.mark.parametrize("prefix", ["encoder.", "teacher/", "visual/", "model.", "Module."])
def test_an_unknown_prefix_is_refused_unless_it_is_asked_for(prefix: str) -> None:
    state = hub_state(tiny.TINY_DINOV2)
    error = refused(tiny.TINY_DINOV2, under(prefix, state))
    assert f"unexpected  {prefix}cls_token" in str(error.got)
    plan = plan_weights(tiny.TINY_DINOV2, of_state(under(prefix, state)), prefix=prefix)
    assert (plan.prefix, plan.keymap.dropped) == (prefix, {})
    assert_same(mapped(plan), state)


def test_a_model_beside_its_average_is_refused_and_each_can_be_chosen() -> None:
    state = hub_state(tiny.TINY_DINOV2)
    averaged = {key: tensor * 2 for key, tensor in state.items()}
    both = {**under("model/", state), **under("model_ema/", averaged)}
    error = refused(tiny.TINY_DINOV2, both)
    assert "more than once" in error.what
    assert str(error.got).splitlines() == [
        f"layout timm (timm's file) under '{prefix}'" for prefix in ("model/", "model_ema/")
    ]
    assert "--prefix" in str(error.hint)
    for prefix, other, expected in (("model/", "model_ema/", state), ("model_ema/", "model/", averaged)):
        plan = plan_weights(tiny.TINY_DINOV2, of_state(both), prefix=prefix)
        assert set(plan.keymap.dropped) == set(under(other, state))
        assert set(plan.keymap.dropped.values()) == {f"outside of the prefix {prefix!r} that was asked for"}
        assert_same(mapped(plan), expected)


def test_a_bare_network_beside_a_prefixed_one_is_refused_and_each_can_be_chosen() -> None:
    state = hub_state(tiny.TINY_DINOV2)
    other = {key: tensor * 2 for key, tensor in state.items()}
    both = {**state, **under("module.", other)}
    assert "more than once" in refused(tiny.TINY_DINOV2, both).what
    for prefix, expected in (("", state), ("module.", other)):
        assert_same(mapped(plan_weights(tiny.TINY_DINOV2, of_state(both), prefix=prefix)), expected)


def test_a_prefix_that_no_key_has_is_refused_with_those_that_there_are() -> None:
    both = {**under("model/", hub_state(tiny.TINY_DINOV2)), **under("visual.", hub_state(tiny.TINY_DINOV2))}
    with pytest.raises(CheckpointError, match=r"no key of the checkpoint starts with 'vision\.'") as raised:
        plan_weights(tiny.TINY_DINOV2, of_state(both), prefix="vision.")
    assert raised.value.got == "keys that start with model/, visual."
    with pytest.raises(UsageError, match="no braces"):
        plan_weights(tiny.TINY_DINOV2, of_state(both), prefix="{i}.")


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_lies_beside_a_container_in_a_training_checkpoint_is_dropped_with_the_reason(
    container: str, tmp_path: Path
) -> None:
    state = hub_state(tiny.TINY_DINOV2)
    moments = {0: {"step": torch.tensor(7), "exp_avg": torch.zeros(3)}}
    training = {"optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]}, "epoch": 3, container[:-1]: state}
    torch.save(training, tmp_path / "checkpoint.pth")
    plan = plan_weights(tiny.TINY_DINOV2, open_checkpoint(tmp_path / "checkpoint.pth"))
    assert plan.prefix == container
    dropped = ("optimizer/state/0/step", "optimizer/state/0/exp_avg", "optimizer/param_groups", "epoch")
    assert plan.keymap.dropped == dict.fromkeys(dropped, f"outside of the container {container}")
    assert_same(mapped(plan), state)


def test_what_lies_beside_bare_keys_is_refused_by_name() -> None:
    error = refused(tiny.TINY_DINOV2, {**hub_state(tiny.TINY_DINOV2), "epoch": torch.tensor(3)})
    assert error.got == "unexpected  epoch []"


@pytest.mark.parametrize("outer", ["", "module.", "state_dict/", "state_dict/module."])
def test_a_text_tower_with_the_same_names_and_shapes_is_dropped_for_the_visual_tower(outer: str) -> None:
    tower = hub_state(tiny.TINY_PE_LANG)
    text = {key: tensor + 1 for key, tensor in tower.items() if key.startswith(("transformer", "positional"))}
    text = {key: tensor for key, tensor in text.items() if ".ls_" not in key}
    text |= {"ln_final.weight": torch.ones(64), "ln_final.bias": torch.ones(64), "logit_scale": torch.tensor(1.0)}
    text |= {"token_embedding.weight": torch.ones(9, 64), "text_projection": torch.ones(64, 64)}
    plan = plan_weights(tiny.TINY_PE_LANG, of_state({**under(outer, text), **under(f"{outer}visual.", tower)}))
    assert plan.prefix == f"{outer}visual."
    assert plan.keymap.dropped == dict.fromkeys(under(outer, text), "text tower")
    assert_same(mapped(plan), mapped(plan_weights(tiny.TINY_PE_LANG, of_state(tower))))


def test_a_key_beside_the_visual_tower_that_no_text_tower_has_is_refused() -> None:
    tower = hub_state(tiny.TINY_PE_LANG)
    error = refused(tiny.TINY_PE_LANG, {**under("visual.", tower), "audio.proj.weight": torch.ones(2)})
    assert error.got == "unexpected  audio.proj.weight [2]"


def test_two_whole_towers_are_refused_and_each_can_be_chosen() -> None:
    tower = hub_state(tiny.TINY_PE_LANG)
    other = {key: tensor * 2 for key, tensor in tower.items()}
    both = {**under("visual.", tower), **under("image_encoder.", other)}
    error = refused(tiny.TINY_PE_LANG, both)
    assert "more than once" in error.what
    assert all(f"under '{prefix}'" in str(error.got) for prefix in ("visual.", "image_encoder."))
    plan = plan_weights(tiny.TINY_PE_LANG, of_state(both), prefix="image_encoder.")
    assert_same(mapped(plan), mapped(plan_weights(tiny.TINY_PE_LANG, of_state(other))))


def test_a_file_whose_keys_have_a_prefix_by_half_is_refused() -> None:
    state = hub_state(tiny.TINY_DINOV2)
    half = {f"module.{key}" if index % 2 else key: tensor for index, (key, tensor) in enumerate(state.items())}
    error = refused(tiny.TINY_DINOV2, half)
    faults = str(error.got).splitlines()
    assert {line.split()[0] for line in faults} == {"missing", "unexpected"}


def test_keys_that_differ_in_their_prefix_alone_are_reported_as_duplicates() -> None:
    state = hub_state(tiny.TINY_DINOV2)
    error = refused(tiny.TINY_DINOV2, {**state, **under("module.", {"norm.bias": state["norm.bias"]})})
    assert str(error.got).splitlines() == [
        "unexpected  module.norm.bias [64]",
        "duplicate   module.norm.bias names what norm.bias fills",
    ]
    assert "--prefix" in str(error.hint)


@pytest.mark.parametrize("other", tiny.FAMILIES, ids=lambda encoder: encoder.name)
@families
def test_another_encoders_checkpoint_is_refused_with_its_name(encoder: EncoderSpec, other: EncoderSpec) -> None:
    (timm,) = (layout for layout in other.layouts if layout.name == "timm")  # whose names are the most alike
    state = seeded_state(other, timm)
    if other is encoder:
        assert plan_weights(encoder, of_state(state)).layout == timm
        return
    error = refused(encoder, state)
    assert error.what == f"the checkpoint does not fit {encoder.name}"
    assert error.hint == f"this looks like a checkpoint of {other.name}: use --model {other.name}"


@pytest.mark.parametrize("prefix", ["visual.", "state_dict/module."])
def test_another_encoders_checkpoint_is_told_under_a_prefix_too(prefix: str) -> None:
    error = refused(tiny.TINY, under(prefix, hub_state(tiny.TINY_AIMV2)))
    assert "--model tiny-aimv2" in str(error.hint)


def test_a_file_of_no_encoder_is_named_as_none() -> None:
    error = refused(tiny.TINY, {"encoder.fc.weight": torch.ones(2, 2)})
    assert "unexpected  encoder.fc.weight [2, 2]" in str(error.got)
    assert "--model" not in str(error.hint)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("aimv2.hf", {"head.cls_token": (1, 1, 1024), "head.k_proj.weight": (1024, 1024)}, "a pooling head: -lit"),
        ("pe-lang.meta", {"ln_post.weight": (1024,), "ln_post.bias": (1024,)}, "a final norm (ln_post): PE-Core"),
        ("pe-lang.meta", {"attn_pool.probe": (1, 1, 1024)}, "attention pooling (attn_pool): PE-Core"),
        ("convnext.openclip", {"visual.head.proj.weight": (512, 1024)}, "open_clip's convnext_base without _w"),
        ("convnext.timm", {"head.fc.weight": (1000, 1024), "head.fc.bias": (1000,)}, "a head of 1000 classes"),
    ],
)
def test_a_lookalike_of_a_published_encoder_is_refused_as_what_it_is(
    name: str, changes: dict[str, tuple[int, ...]], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu_export.encoders, "ENCODERS", FULL_SIZE)
    shapes = published_shapes(f"{name}.tsv")
    (encoder,) = (encoder for encoder in FULL_SIZE if encoder.name.startswith(name.partition(".")[0].replace("_", "-")))
    with pytest.raises(CheckpointError, match="does not fit") as raised:
        plan_weights(encoder, of_shapes({**shapes, **changes}))
    assert str(raised.value.hint).startswith("this is another model: it has ")
    assert told in str(raised.value.hint)


def test_another_full_size_encoder_is_told_by_its_published_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu_export.encoders, "ENCODERS", FULL_SIZE)
    with pytest.raises(CheckpointError) as raised:
        plan_weights(find_encoder("vit-base"), of_shapes(published_shapes("dinov2.timm.tsv")))
    assert "--model dinov2-small-reg4" in str(raised.value.hint)


def test_a_projection_of_another_width_is_refused_by_name() -> None:
    state = seeded_state(tiny.TINY_CONVNEXT, tiny.TINY_CONVNEXT.layouts[1])
    state["head.proj.weight"] = torch.ones(12, 32)
    error = refused(tiny.TINY_CONVNEXT, under("module.visual.", state))
    assert error.got == "mismatched  head.fc.weight expected [20, 32], got [12, 32]"
    assert error.hint == "this is another model: it has a projection to 12: without _w"
    state["head.proj.weight"] = torch.ones(13, 32)
    assert "another model" not in str(refused(tiny.TINY_CONVNEXT, state).hint)


@pytest.mark.parametrize("classes", [1, 10, 1000, 21843])
@pytest.mark.parametrize(
    ("index", "prefix", "weight", "bias", "transposed"),
    [
        (0, "vit.", "classifier.weight", "classifier.bias", False),
        (1, "vit.", "classifier.weight", "classifier.bias", False),
        (2, "", "head.weight", "head.bias", False),
        (3, "", "head/kernel", "head/bias", True),
    ],
)
@pytest.mark.parametrize("outer", ["", "module."])
def test_the_classifier_of_vit_is_dropped_whatever_its_size(
    index: int, prefix: str, weight: str, bias: str, transposed: bool, classes: int, outer: str
) -> None:
    state = under(prefix, seeded_state(tiny.TINY, tiny.TINY.layouts[index]))
    head = {weight: torch.ones((64, classes) if transposed else (classes, 64)), bias: torch.ones(classes)}
    plan = plan_weights(tiny.TINY, of_state(under(outer, {**state, **head})))
    assert plan.layout == tiny.TINY.layouts[index]
    assert plan.keymap.dropped == dict.fromkeys(under(outer, head), "the encoder ends at the final norm")


def test_a_layout_that_is_asked_for_is_the_only_one_that_is_tried() -> None:
    state = hub_state(tiny.TINY_DINOV2)
    assert plan_weights(tiny.TINY_DINOV2, of_state(state), "timm").layout.name == "timm"
    error = refused(tiny.TINY_DINOV2, state, layout="meta")
    assert "layout meta" in str(error.where)
    assert "missing     register_tokens [1, 4, 64]" in str(error.got)


def test_an_encoder_that_was_trained_with_a_mask_drops_the_mask_alone() -> None:
    meta = seeded_state(tiny.TINY_DINOV2, tiny.TINY_DINOV2.layouts[1])
    plan = plan_weights(tiny.TINY_DINOV2, of_state({**meta, "mask_token": torch.ones(1, 64)}))
    assert plan.keymap.dropped == {"mask_token": "used in training alone"}
    timm = hub_state(tiny.TINY_DINOV2)
    assert refused(tiny.TINY_DINOV2, {**timm, "mask_token": torch.ones(1, 64)}).got == "unexpected  mask_token [1, 64]"
