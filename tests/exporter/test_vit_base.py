"""vit-base at full size, against transformers' own ViTModel with the same weights."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from npu_export.eager import run_eager
from npu_export.encoders.vit import VIT_BASE
from npu_export.network import load_network, plan_weights
from npu_export.pipeline import export
from npu_export.random_weights import seeded_tensor
from npu_export.timm_import import import_timm
from npu_export.weights import find_weights
from npu_runtime.artifact.store import open_artifact
from npu_runtime.parity.inputs import seeded_images
from npu_runtime.torch_interop import without_jit_deprecation

HUB_LAYOUT = Path(__file__).parents[1] / "data" / "layouts" / "vit.hf.tsv"
BATCHES = (1, 4)
CHECKPOINT_NBYTES = 343_000_000
EXPORT_OVERHEAD_NBYTES = 1_200_000_000


def images(batch: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return seeded_images(range(100, 100 + batch), (3, 224, 224))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The 200 tensors of the hub's file, seeded."""
    file = tmp_path_factory.mktemp("vit-base") / "model.safetensors"
    lines = (line.split("\t") for line in HUB_LAYOUT.read_text("utf-8").splitlines())
    shapes = {key: tuple(map(int, dims.split(","))) for key, dims in lines}
    save_file({key: torch.from_numpy(seeded_tensor(key, shape, 0)) for key, shape in shapes.items()}, file)
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("vit-base") / "artifact"
    yield export("vit-base", weights=str(checkpoint), batch=BATCHES, output=output)
    for path in output.iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> nn.Module:
    return load_network(plan_weights(VIT_BASE, find_weights(VIT_BASE, str(checkpoint))))


@pytest.fixture(scope="module")
def hugging_face(checkpoint: Path) -> nn.Module:
    """transformers' ViTModel without its pooler, filled by strict loading under the hub's names."""
    import_timm()  # declares torchvision's operators where they are missing; transformers imports torchvision too
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(), add_pooling_layer=False).eval()
    state = {}
    for key, tensor in load_file(checkpoint).items():
        if not key.startswith("classifier."):
            state[key.removeprefix("vit.")] = tensor
    if "layers.0.attention.q_proj.weight" in model.state_dict():
        state = {_since_transformers_5(key): tensor for key, tensor in state.items()}
    model.load_state_dict(state, strict=True)
    return model


def _since_transformers_5(key: str) -> str:
    """Names that transformers 5 gives the modules at run time; its files keep the old ones."""
    renames = (
        (r"^encoder\.layer\.", "layers."),
        (r"attention\.attention\.(q)uery", r"attention.\1_proj"),
        (r"attention\.attention\.(k)ey", r"attention.\1_proj"),
        (r"attention\.attention\.(v)alue", r"attention.\1_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
    )
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


@pytest.mark.parametrize("batch", BATCHES)
def test_the_onnx_graphs_agree_with_transformers(artifact: Path, hugging_face: nn.Module, batch: int) -> None:
    pixel_values = images(batch)
    with torch.inference_mode():
        tokens = hugging_face(torch.from_numpy(pixel_values)).last_hidden_state.numpy()
    session = onnxruntime.InferenceSession(str(artifact / f"model.b{batch}.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(["embedding", "tokens"], {"pixel_values": pixel_values})
    assert np.abs(got[0] - tokens[:, 0]).max() <= 5e-5
    assert np.abs(got[1] - tokens).max() <= 5e-5
    assert np.abs(tokens).max() > 1


@pytest.mark.parametrize("batch", BATCHES)
def test_the_torchscript_program_is_the_eager_network_bit_for_bit(
    artifact: Path, network: nn.Module, batch: int
) -> None:
    with without_jit_deprecation():
        program = torch.jit.load(str(artifact / "model.ts"))
    pixel_values = images(batch)
    with torch.inference_mode():
        got = getattr(program, f"b{batch}")(torch.from_numpy(pixel_values))
    expected = run_eager(VIT_BASE.with_outputs(network), pixel_values)
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(got, expected))


def test_every_parameter_is_filled_from_the_200_tensors_of_the_hub(artifact: Path, network: nn.Module) -> None:
    coverage = open_artifact(artifact).manifest.provenance.weights.coverage
    assert coverage.matched + coverage.transformed + coverage.dropped == 200
    assert (coverage.transformed, coverage.dropped) == (72, 2)
    assert coverage.parameters == sum(p.numel() for p in network.parameters()) == 85_798_656


def test_each_weights_file_holds_the_weights_once(artifact: Path) -> None:
    for name in ("model.ts", "weights.onnx.data"):
        assert 1 <= (artifact / name).stat().st_size / (4 * 85_798_656) < 1.01


MEASURED_EXPORT = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.full
def test_an_export_needs_little_more_memory_than_torch_and_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    export_command = [sys.executable, "-c", "from npu_export.cli import main; main()", "--model", "vit-base"]
    arguments = ["--batch", "1,4", "--weights", str(checkpoint), "--output", str(tmp_path / "artifact"), "--json"]
    run = subprocess.run(
        [sys.executable, "-c", MEASURED_EXPORT, *export_command, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    peak_nbytes = int(run.stdout.splitlines()[-1]) * 1024
    assert peak_nbytes <= CHECKPOINT_NBYTES + EXPORT_OVERHEAD_NBYTES
