"""Planning and loading the weights of a network, refusals by name; test_builds.py is about the network without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from checkpoints import State, of_state, seeded_state
from safetensors.torch import load_file, save_file

import npu_export.encoders
from npu_export.checkpoint import open_checkpoint
from npu_export.encoders.spec import EncoderSpec
from npu_export.errors import CheckpointError
from npu_export.network import WeightsPlan, load_network, plan_weights, state_sha256
from npu_export.weights import find_weights
from npu_runtime.errors import UsageError

families = pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)


@pytest.fixture(autouse=True)
def only_tiny_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal tries every encoder's layouts: leave out those of full size, for time."""
    monkeypatch.setattr(npu_export.encoders, "ENCODERS", tiny.FAMILIES)


@pytest.fixture
def state(tiny_checkpoint: Path) -> State:
    return load_file(tiny_checkpoint / "model.safetensors")


def save(state: State, folder: Path, **config: object) -> str:
    save_file(state, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def plan(weights: str) -> WeightsPlan:
    return plan_weights(tiny.TINY, find_weights(tiny.TINY, weights))


def refused(state: State, encoder: EncoderSpec = tiny.TINY) -> CheckpointError:
    with pytest.raises(CheckpointError) as raised:
        plan_weights(encoder, of_state(state))
    return raised.value


def test_a_checkpoint_without_a_tensor_is_refused_by_name(state: State) -> None:
    for layer in (0, 1):
        del state[f"vit.encoder.layer.{layer}.layernorm_before.bias"]
    error = refused(state)
    assert error.what == "the checkpoint does not fit tiny-vit"
    assert error.got == "missing     vit.encoder.layer.{0-1}.layernorm_before.bias [64] (2)"


def test_a_checkpoint_without_a_part_of_qkv_is_refused_by_its_name(state: State) -> None:
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    assert refused(state).got == "missing     vit.encoder.layer.1.attention.attention.key.weight [64, 64]"


def test_a_checkpoint_with_a_tensor_more_is_refused_by_name(state: State) -> None:
    for layer in (2, 3):
        state[f"vit.encoder.layer.{layer}.layernorm_before.bias"] = torch.zeros(64)
    state["vit.adapter.bias"] = torch.zeros(64)
    assert sorted(str(refused(state).got).splitlines()) == [
        "unexpected  vit.adapter.bias [64]",
        "unexpected  vit.encoder.layer.{2-3}.layernorm_before.bias [64] (2)",
    ]


def test_a_checkpoint_with_another_shape_is_refused_by_name(state: State) -> None:
    for layer in (0, 1):
        state[f"vit.encoder.layer.{layer}.intermediate.dense.bias"] = torch.zeros(128)
    assert refused(state).got == "mismatched  blocks.{0-1}.mlp.fc1.bias expected [256], got [128] (2)"


def test_a_transposed_matrix_is_refused(state: State) -> None:
    name = "vit.encoder.layer.0.intermediate.dense.weight"
    state[name] = state[name].T.contiguous()
    assert refused(state).got == "mismatched  blocks.0.mlp.fc1.weight expected [256, 64], got [64, 256]"


def test_the_coverage_counts_every_key_and_every_element(state: State) -> None:
    state |= {"classifier.weight": torch.zeros(10, 64), "classifier.bias": torch.zeros(10)}
    planned = plan_weights(tiny.TINY, of_state(state))
    coverage = planned.coverage()
    assert (coverage.transformed, coverage.dropped) == (2 * 2 * 3, 2)
    assert coverage.matched + coverage.transformed + coverage.dropped == len(state)
    assert coverage.parameters == sum(t.numel() for t in load_network(planned).state_dict().values())


def test_a_layout_that_does_not_exist_is_refused_and_an_existing_one_is_used(tiny_checkpoint: Path) -> None:
    checkpoint = find_weights(tiny.TINY, str(tiny_checkpoint))
    with pytest.raises(UsageError, match="unknown layout 'meta'") as raised:
        plan_weights(tiny.TINY, checkpoint, "meta")
    assert raised.value.expected == "auto, hf, timm, jax"
    assert plan_weights(tiny.TINY, checkpoint, "hf").layout == plan_weights(tiny.TINY, checkpoint).layout


AGREEING = {
    "architectures": ["ViTForImageClassification"],
    "hidden_act": "gelu",
    "hidden_size": 64,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 4,
    "patch_size": 8,
    "qkv_bias": True,
}


def test_a_config_that_agrees_is_accepted_whatever_its_image_size(state: State, tmp_path: Path) -> None:
    assert plan(save(state, tmp_path, **AGREEING, image_size=64)).keymap.complete


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 8),
        ("layer_norm_eps", 1e-6),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("patch_size", 16),
        ("qkv_bias", False),
        ("hidden_size", None),
    ],
)
def test_a_config_of_another_network_is_refused_by_name(name: str, value: object, state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json beside the weights describes another network") as raised:
        plan(save(state, tmp_path, **{**AGREEING, name: value}))
    assert raised.value.got == f"{name} = {value!r}, not {AGREEING[name]!r}"


@families
def test_a_loaded_network_is_filled_wholly_in_eval_mode_and_without_gradients(encoder: EncoderSpec) -> None:
    for layout in encoder.layouts:
        network = load_network(plan_weights(encoder, of_state(seeded_state(encoder, layout))))
        tensors = [*network.parameters(), *network.buffers()]
        assert all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        assert all(tensor.is_contiguous() and tensor.isfinite().all() for tensor in tensors)
        assert not any(tensor.requires_grad for tensor in tensors)
        assert not any(module.training for module in network.modules())
        assert sum(parameter.numel() for parameter in network.parameters()) == encoder.published.parameters


def test_a_loaded_network_holds_the_checkpoints_values(state: State, tiny_checkpoint: Path) -> None:
    loaded = load_network(plan(str(tiny_checkpoint))).state_dict()
    layer = "vit.encoder.layer.1.attention.attention"
    for leaf in ("weight", "bias"):
        parts = loaded[f"blocks.1.attn.qkv.{leaf}"].chunk(3)
        assert all(torch.equal(a, state[f"{layer}.{b}.{leaf}"]) for a, b in zip(parts, ("query", "key", "value")))
    assert torch.equal(loaded["pos_embed"], state["vit.embeddings.position_embeddings"])
    assert torch.equal(loaded["norm.bias"], state["vit.layernorm.bias"])


def test_a_loaded_network_outlives_its_file(state: State, tmp_path: Path) -> None:
    network = load_network(plan(save(state, tmp_path)))
    digest = state_sha256(network)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert state_sha256(network) == digest


def test_a_loaded_network_is_apart_from_the_tensors_it_was_loaded_from(state: State) -> None:
    network = load_network(plan_weights(tiny.TINY, of_state(state)))
    digest = state_sha256(network)
    for tensor in state.values():
        tensor.zero_()
    assert state_sha256(network) == digest


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_widened_exactly(dtype: torch.dtype, encoder: EncoderSpec) -> None:
    for layout in encoder.layouts:
        half = {name: tensor.to(dtype) for name, tensor in seeded_state(encoder, layout).items()}
        exact = {name: tensor.to(torch.float32) for name, tensor in half.items()}
        networks = [load_network(plan_weights(encoder, of_state(held))) for held in (half, exact)]
        assert state_sha256(networks[0]) == state_sha256(networks[1])
        assert {tensor.dtype for tensor in networks[0].state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64])
def test_used_tensors_of_other_dtypes_are_refused_by_name_and_dropped_ones_are_not(
    dtype: torch.dtype, state: State
) -> None:
    dropped = {"classifier.weight": torch.zeros(2, 64, dtype=dtype), "classifier.bias": torch.zeros(2, dtype=dtype)}
    assert plan_weights(tiny.TINY, of_state(state | dropped)).coverage().dropped == 2
    for layer in (0, 1):
        name = f"vit.encoder.layer.{layer}.layernorm_before.bias"
        state[name] = state[name].to(dtype)
    error = refused(state)
    assert error.what == "the checkpoint holds weights of other dtypes"
    spelled = str(dtype).removeprefix("torch.")
    assert error.got == f"vit.encoder.layer.{{0-1}}.layernorm_before.bias {spelled} (2)"
    assert error.expected == "float32, float16, bfloat16"


def test_a_key_that_is_no_tensor_is_refused_where_a_tensor_is_wanted(state: State, tmp_path: Path) -> None:
    torch.save({**state, "vit.layernorm.bias": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not fit") as raised:
        plan(str(tmp_path))
    assert raised.value.got == "mismatched  norm.bias expected [64], got []"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, dtype: torch.dtype, state: State) -> None:
    for layer in (0, 1):
        name = f"vit.encoder.layer.{layer}.attention.attention.key.weight"
        state[name] = state[name].to(dtype)
        state[name][5, 7] = value
    planned = plan_weights(tiny.TINY, of_state(state))
    with pytest.raises(CheckpointError, match="NaN or infinite") as raised:
        load_network(planned)
    assert raised.value.got == "blocks.{0-1}.attn.qkv.weight [192, 64] (2)"


def test_a_dropped_tensor_may_hold_anything(state: State) -> None:
    state |= {"classifier.weight": torch.full((2, 64), float("nan")), "classifier.bias": torch.zeros(2)}
    assert load_network(plan_weights(tiny.TINY, of_state(state)))


def test_the_state_digest_depends_on_neither_order_nor_file_format(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "a")
    torch.save(dict(reversed(state.items())), tmp_path / "b")
    torch.save(state, tmp_path / "c", _use_new_zipfile_serialization=False)
    digests = {state_sha256(load_network(plan_weights(tiny.TINY, open_checkpoint(tmp_path / name)))) for name in "abc"}
    assert len(digests) == 1


def test_the_state_digest_does_not_depend_on_the_order_of_modules() -> None:
    norm, linear = torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)
    there = torch.nn.ModuleDict({"a": norm, "b": linear})
    back = torch.nn.ModuleDict({"b": linear, "a": norm})
    assert list(there.state_dict()) != list(back.state_dict())
    assert state_sha256(there) == state_sha256(back)


def _negate(network: torch.nn.Module) -> None:
    network.norm.bias.data[0] *= -1


def _swap_equal_shapes(network: torch.nn.Module) -> None:
    network.blocks[0], network.blocks[1] = network.blocks[1], network.blocks[0]


def _rename(network: torch.nn.Module) -> None:
    network.other = network.norm
    del network.norm


@pytest.mark.parametrize("change", [_negate, _swap_equal_shapes, _rename])
def test_the_state_digest_depends_on_names_and_values(change: Callable[[torch.nn.Module], None]) -> None:
    network = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:0")))
    before = state_sha256(network)
    assert state_sha256(network) == before
    change(network)
    assert state_sha256(network) != before


@families
def test_a_loaded_network_runs_as_one_that_was_built_normally(encoder: EncoderSpec) -> None:
    for layout in encoder.layouts:
        planned = plan_weights(encoder, of_state(seeded_state(encoder, layout)))
        loaded, normal = load_network(planned), planned.layout.build()
        normal.load_state_dict(loaded.state_dict())
        size = encoder.image_size
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            outputs = [encoder.with_outputs(network)(images) for network in (loaded, normal)]
        assert [tuple(output.shape[1:]) for output in outputs[0]] == [spec.shape[1:] for spec in encoder.outputs]
        assert all(torch.equal(a, b) for a, b in zip(*outputs))
