from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from npu_export.checkpoint import open_checkpoint
from npu_export.encoders.spec import EncoderSpec
from npu_export.encoders.vit import VIT_BASE
from npu_export.errors import CheckpointError
from npu_export.network import load_network, network_shapes, plan_weights, state_sha256
from npu_export.weights import find_weights
from npu_runtime.errors import UsageError

State = dict[str, torch.Tensor]


@pytest.fixture
def state(tiny_checkpoint: Path) -> State:
    return load_file(tiny_checkpoint / "model.safetensors")


def save(state: State, folder: Path, **config: object) -> str:
    save_file(state, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def plan(weights: str) -> object:
    return plan_weights(tiny.TINY, find_weights(tiny.TINY, weights))


def test_a_checkpoint_without_a_tensor_is_refused_by_name(state: State, tmp_path: Path) -> None:
    for layer in (0, 1):
        del state[f"vit.encoder.layer.{layer}.layernorm_before.bias"]
    with pytest.raises(CheckpointError, match="does not fit tiny-vit") as raised:
        plan(save(state, tmp_path))
    assert raised.value.got == "missing     vit.encoder.layer.{0-1}.layernorm_before.bias [64] (2)"


def test_a_checkpoint_without_a_part_of_qkv_is_refused_by_its_name(state: State, tmp_path: Path) -> None:
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(CheckpointError) as raised:
        plan(save(state, tmp_path))
    assert raised.value.got == "missing     vit.encoder.layer.1.attention.attention.key.weight [64, 64]"


def test_a_checkpoint_with_a_tensor_more_is_refused_by_name(state: State, tmp_path: Path) -> None:
    for layer in (2, 3):
        state[f"vit.encoder.layer.{layer}.layernorm_before.bias"] = torch.zeros(64)
    state["vit.pooler.dense.bias"] = torch.zeros(64)
    with pytest.raises(CheckpointError) as raised:
        plan(save(state, tmp_path))
    assert sorted(str(raised.value.got).splitlines()) == [
        "unexpected  vit.encoder.layer.{2-3}.layernorm_before.bias [64] (2)",
        "unexpected  vit.pooler.dense.bias [64]",
    ]


def test_a_checkpoint_with_another_shape_is_refused_by_name(state: State, tmp_path: Path) -> None:
    for layer in (0, 1):
        state[f"vit.encoder.layer.{layer}.intermediate.dense.bias"] = torch.zeros(128)
    with pytest.raises(CheckpointError) as raised:
        plan(save(state, tmp_path))
    assert raised.value.got == "mismatched  blocks.{0-1}.mlp.fc1.bias expected [256], got [128] (2)"


def test_a_transposed_matrix_is_refused(state: State, tmp_path: Path) -> None:
    name = "vit.encoder.layer.0.intermediate.dense.weight"
    state[name] = state[name].T.contiguous()
    with pytest.raises(CheckpointError) as raised:
        plan(save(state, tmp_path))
    assert raised.value.got == "mismatched  blocks.0.mlp.fc1.weight expected [256, 64], got [64, 256]"


def test_the_checkpoint_of_another_encoder_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit vit-base"):
        plan_weights(VIT_BASE, find_weights(VIT_BASE, str(tiny_checkpoint)))


def test_a_checkpoint_with_the_classifier_of_the_hub_fits(state: State, tmp_path: Path) -> None:
    state |= {"classifier.weight": torch.zeros(10, 64), "classifier.bias": torch.zeros(10)}
    planned = plan_weights(tiny.TINY, find_weights(tiny.TINY, save(state, tmp_path)))
    assert planned.coverage().dropped == 2
    assert planned.coverage().parameters == sum(t.numel() for t in load_network(planned).state_dict().values())
    assert planned.coverage().renamed + planned.coverage().transformed + 2 == len(state)


def test_a_layout_that_does_not_exist_is_refused_and_an_existing_one_is_used(tiny_checkpoint: Path) -> None:
    checkpoint = find_weights(tiny.TINY, str(tiny_checkpoint))
    with pytest.raises(UsageError, match="unknown layout 'timm'") as raised:
        plan_weights(tiny.TINY, checkpoint, "timm")
    assert raised.value.expected == "auto, hf"
    assert plan_weights(tiny.TINY, checkpoint, "hf").layout == plan_weights(tiny.TINY, checkpoint).layout


AGREEING = {
    "architectures": ["ViTForImageClassification"],
    "hidden_act": "gelu",
    "hidden_size": 64,
    "image_size": 32,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 4,
    "patch_size": 8,
    "qkv_bias": True,
}


def test_a_config_that_agrees_is_accepted(state: State, tmp_path: Path) -> None:
    assert plan(save(state, tmp_path, **AGREEING))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 8),
        ("layer_norm_eps", 1e-6),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("image_size", 64),
        ("patch_size", 16),
        ("qkv_bias", False),
        ("hidden_size", None),
    ],
)
def test_a_config_of_another_network_is_refused_by_name(name: str, value: object, state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json beside the weights describes another network") as raised:
        plan(save(state, tmp_path, **{**AGREEING, name: value}))
    assert raised.value.got == f"{name} = {value!r}, not {AGREEING[name]!r}"


def test_a_loaded_network_is_filled_wholly(tiny_checkpoint: Path) -> None:
    network = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, str(tiny_checkpoint))))
    tensors = [*network.parameters(), *network.buffers()]
    assert tensors
    assert all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    assert not any(tensor.requires_grad for tensor in tensors)
    assert not any(module.training for module in network.modules())
    assert sum(tensor.numel() for tensor in tensors) == tiny.TINY.parameters


def test_a_loaded_network_holds_the_checkpoints_values(state: State, tiny_checkpoint: Path) -> None:
    loaded = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, str(tiny_checkpoint)))).state_dict()
    layer = "vit.encoder.layer.1.attention.attention"
    for leaf in ("weight", "bias"):
        parts = loaded[f"blocks.1.attn.qkv.{leaf}"].chunk(3)
        assert all(torch.equal(a, state[f"{layer}.{b}.{leaf}"]) for a, b in zip(parts, ("query", "key", "value")))
    assert torch.equal(loaded["pos_embed"], state["vit.embeddings.position_embeddings"])
    assert torch.equal(loaded["norm.bias"], state["vit.layernorm.bias"])


def test_a_loaded_network_outlives_its_file(state: State, tmp_path: Path) -> None:
    network = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, save(state, tmp_path))))
    digest = state_sha256(network)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert state_sha256(network) == digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_widened_exactly(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    (tmp_path / "half").mkdir()
    (tmp_path / "full").mkdir()
    exact = {name: tensor.to(torch.float32) for name, tensor in half.items()}
    networks = [
        load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, save(tensors, tmp_path / name))))
        for name, tensors in (("half", half), ("full", exact))
    ]
    assert state_sha256(networks[0]) == state_sha256(networks[1])
    assert {tensor.dtype for tensor in networks[0].state_dict().values()} == {torch.float32}


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


@pytest.mark.parametrize("encoder", [tiny.TINY, VIT_BASE], ids=lambda encoder: encoder.name)
def test_the_network_built_without_memory_is_the_one_built_with_it(encoder: EncoderSpec) -> None:
    for layout in encoder.layouts:
        normal = layout.build()
        assert network_shapes(layout) == {name: tuple(t.shape) for name, t in normal.state_dict().items()}
        with torch.device("meta"):
            on_meta = layout.build()
        assert str(on_meta) == str(normal)
        assert sum(p.numel() for p in normal.parameters()) == encoder.parameters
        stored = set(normal.state_dict())
        assert not [name for name, _ in normal.named_buffers() if name not in stored]


def test_a_network_filled_on_meta_runs_as_one_that_was_built_normally() -> None:
    planned = plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:0"))
    loaded = load_network(planned)
    normal = planned.layout.build()
    normal.load_state_dict(loaded.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.forward_features(images), normal.forward_features(images))


@pytest.mark.parametrize("encoder", [tiny.TINY, VIT_BASE], ids=lambda encoder: encoder.name)
def test_the_networks_layer_norms_have_hugging_faces_eps(encoder: EncoderSpec) -> None:
    with torch.device("meta"):
        network = encoder.layouts[0].build()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * len(network.blocks) + 1
    assert {norm.eps for norm in norms} == {1e-12}
