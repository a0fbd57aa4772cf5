"""Exported programs against the publishers' own classes, with the same weights saved as those classes save them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

from npu_export.encoders.aimv2 import AIMV2_LARGE_DISTILLED
from npu_export.encoders.convnext import CONVNEXT_BASE_CLIP
from npu_export.encoders.dinov2 import DINOV2_SMALL_REG4
from npu_export.encoders.spec import EncoderSpec
from npu_export.pipeline import export
from npu_export.random_weights import seeded_tensor
from npu_export.timm_import import import_timm
from npu_runtime.artifact.store import open_artifact
from npu_runtime.parity.inputs import seeded_images

NEAR = 5e-5
Outputs = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Peer:
    """A network of another library, and what of its outputs ours must equal."""

    encoder: EncoderSpec
    build: Callable[[EncoderSpec], nn.Module]
    outputs: Callable[[nn.Module, torch.Tensor], Mapping[str, torch.Tensor]]

    def __str__(self) -> str:
        return self.encoder.name


def transformers_vit(encoder: EncoderSpec) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8
    )
    return ViTModel(config, add_pooling_layer=False)


def transformers_dinov2(encoder: EncoderSpec) -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    full = encoder == DINOV2_SMALL_REG4
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=384 if full else 64,
            num_hidden_layers=12 if full else 2,
            num_attention_heads=6 if full else 4,
            image_size=encoder.image_size,
            patch_size=14,
        )
    )


def transformers_aimv2(encoder: EncoderSpec) -> nn.Module:
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    full = encoder == AIMV2_LARGE_DISTILLED
    return Aimv2VisionModel(
        Aimv2VisionConfig(
            hidden_size=1024 if full else 64,
            intermediate_size=2816 if full else 176,
            num_hidden_layers=24 if full else 2,
            num_attention_heads=8 if full else 4,
            image_size=encoder.image_size,
            patch_size=14,
            use_head=False,
        )
    )


def open_clip_convnext(encoder: EncoderSpec) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    model: nn.Module = open_clip.create_model("convnext_base_w", pretrained=None)
    return model


def cls_and_tokens(model: nn.Module, pixel_values: torch.Tensor) -> Mapping[str, torch.Tensor]:
    tokens = model(pixel_values).last_hidden_state
    return {"embedding": tokens[:, 0], "tokens": tokens}


def mean_and_tokens(model: nn.Module, pixel_values: torch.Tensor) -> Mapping[str, torch.Tensor]:
    tokens = model(pixel_values).last_hidden_state
    return {"embedding": tokens.mean(dim=1), "tokens": tokens}


def encode_image(model: Any, pixel_values: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {"embedding": model.encode_image(pixel_values)}


SMALL = [
    Peer(tiny.TINY, transformers_vit, cls_and_tokens),
    Peer(tiny.TINY_DINOV2, transformers_dinov2, cls_and_tokens),
    Peer(tiny.TINY_AIMV2, transformers_aimv2, mean_and_tokens),
]
FULL_SIZE = [
    Peer(DINOV2_SMALL_REG4, transformers_dinov2, cls_and_tokens),
    Peer(AIMV2_LARGE_DISTILLED, transformers_aimv2, mean_and_tokens),
    Peer(CONVNEXT_BASE_CLIP, open_clip_convnext, encode_image),
]


def seeded(peer: Peer) -> nn.Module:
    import_timm()  # declares torchvision's operators where they are missing; transformers imports torchvision too
    model = peer.build(peer.encoder).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(seeded_tensor(name, tuple(parameter.shape), 0)))
    return model


def save_as_files_are(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def save_in_shards(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def save_at_run_time(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "runtime.pt")
    return folder / "runtime.pt"


def save_as_safetensors(model: nn.Module, folder: Path) -> Path:
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def check_agreement(peer: Peer, save: Callable[[nn.Module, Path], Path], folder: Path, layout: str) -> None:
    model = seeded(peer)
    weights = save(model, folder)
    side = peer.encoder.image_size
    pixel_values = seeded_images((100, 101), (3, side, side))
    with torch.inference_mode():
        expected = {n: t.numpy() for n, t in peer.outputs(model, torch.from_numpy(pixel_values)).items()}
    del model
    artifact = export(peer.encoder, weights=str(weights), formats=("onnx",), batch=(2,), output=folder / "artifact")
    assert open_artifact(artifact).manifest.provenance.weights.layout == layout
    session = onnxruntime.InferenceSession(str(artifact / "model.b2.onnx"), providers=["CPUExecutionProvider"])
    for name, array in zip(expected, session.run(list(expected), {"pixel_values": pixel_values})):
        assert np.abs(array - expected[name]).max() <= NEAR, name
        assert np.abs(expected[name]).max() > 0.5, name


@pytest.mark.parametrize("save", [save_as_files_are, save_in_shards, save_at_run_time])
@pytest.mark.parametrize("peer", SMALL, ids=str)
def test_an_export_agrees_with_transformers(
    peer: Peer, save: Callable[[nn.Module, Path], Path], tmp_path: Path
) -> None:
    check_agreement(peer, save, tmp_path, "hf")


@pytest.mark.parametrize("peer", SMALL, ids=str)
def test_a_config_json_of_transformers_is_read_and_one_of_other_heads_refused(peer: Peer, tmp_path: Path) -> None:
    from npu_export.errors import CheckpointError

    save_as_files_are(seeded(peer), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert settings["num_attention_heads"] == 4
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_attention_heads": 8}), "utf-8")
    with pytest.raises(CheckpointError, match="num_attention_heads = 8"):
        export(peer.encoder, weights=str(tmp_path), output=tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.full
@pytest.mark.parametrize("peer", FULL_SIZE, ids=str)
def test_an_export_at_full_size_agrees_with_its_peer(peer: Peer, tmp_path: Path) -> None:
    layout = "openclip" if peer.encoder is CONVNEXT_BASE_CLIP else "hf"
    check_agreement(peer, save_as_safetensors, tmp_path, layout)
