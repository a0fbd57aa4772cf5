"""Every command on an artifact whose programs take uint8 and normalise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

import npu_runtime
from npu_export.pipeline import export
from npu_runtime.torch_interop import without_jit_deprecation

Call = Callable[..., Any]
SPEC = {"name": "pixel_values", "dtype": "uint8", "shape": ["B", 32, 32, 3], "groups": []}
NOT_IN_A_FRESH_PROCESS = {"eager"}
"""A new process does not know the tiny encoder."""


@pytest.fixture(scope="session")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder, both formats, batch 1, with probes. Not to be changed."""
    output = tmp_path_factory.mktemp("pixels") / "tiny-vit"
    return export("tiny-vit", weights=str(tiny_checkpoint), input="uint8", probes=True, output=output)


def test_npu_export_takes_the_input_says_what_it_plans_and_records_it(call: Call, tmp_path: Path) -> None:
    arguments = ("npu-export", "--model", "tiny-vit", "--weights", "random:5", "--input", "uint8", "--format", "onnx")
    planned = call(*arguments, "--dry-run")
    assert planned.code == 0
    assert "            pixel_values uint8 [B, 32, 32, 3]\n" in planned.out
    assert "  output    tiny-vit-fp32-uint8  (dry run" in planned.out
    data = call(*arguments, "--dry-run", "--json").json
    assert data["inputs"] == [SPEC]
    done = call(*arguments, "--output", tmp_path / "made", "--json")
    assert done.code == 0, done.err
    assert done.json["manifest"]["inputs"] == [SPEC]
    assert (tmp_path / "made" / "reference.safetensors").stat().st_size == pytest.approx(
        data["nbytes"]["reference.safetensors"], abs=1000
    )
    refused = call(*arguments[:5], "--input", "int8", "--dry-run")
    assert refused.code == 2
    assert "'float32', 'uint8'" in refused.err


def test_inspect_says_what_an_image_takes(call: Call, artifact: Path, tiny_artifact: Path) -> None:
    assert (
        "input     pixel_values uint8 [B, 32, 32, 3], 3.1 kB an image\n" in call("npu-runtime", "inspect", artifact).out
    )
    told = call("npu-runtime", "inspect", tiny_artifact).out
    assert "input     pixel_values float32 [B, 3, 32, 32], 12.3 kB an image\n" in told


def test_verify_and_parity_run_bytes_photographs_and_arrays(
    call: Call, artifact: Path, photographs: Path, tmp_path: Path
) -> None:
    assert call("npu-runtime", "verify", artifact).code == 0
    worst = tmp_path / "worst.safetensors"
    arguments = ("--images", photographs, "--seeds", "42,7", "--localise", "--save-worst", worst, "--json")
    done = call("npu-runtime", "parity", artifact, *arguments)
    assert done.code == 0, done.err
    record = done.json
    assert [step["backend"] for step in record["steps"]] == ["eager", "torchscript", "onnxruntime"]
    assert {step["status"] for step in record["steps"]} == {"passed"}
    assert [taken["kind"] for taken in record["inputs"]] == ["seed", "seed", "image", "image"]
    assert [found["first"] for found in record["localised"]] == [None, None]
    again = load_file(worst)["pixel_values"]
    assert (again.dtype, again.shape) == (np.uint8, (1, 32, 32, 3))
    assert call("npu-runtime", "parity", artifact, "--arrays", worst).code == 0
    np.save(tmp_path / "floats.npy", np.zeros((1, 3, 32, 32), np.float32))
    refused = call("npu-runtime", "parity", artifact, "--arrays", tmp_path / "floats.npy")
    assert refused.code == 1
    assert "uint8 [N, 32, 32, 3]" in refused.err


def test_bench_runs_each_backend_under_every_measure(call: Call, artifact: Path) -> None:
    arguments = ("--iterations", "2", "--warmup", "1", "--callers", "2", "--seconds", "0.2", "--cold", "--json")
    done = call("npu-runtime", "bench", artifact, *arguments)
    assert done.code == 0, done.err
    backends = {"eager", "torchscript", "onnxruntime"}
    assert {row["backend"] for row in done.json["rows"]} == backends
    assert {row["backend"] for row in done.json["throughput"]} == backends
    assert {start["backend"] for start in done.json["cold"]} == backends - NOT_IN_A_FRESH_PROCESS


def test_embed_gives_the_features_of_the_artifact_of_floats(
    call: Call, artifact: Path, tiny_artifact: Path, photographs: Path, tmp_path: Path
) -> None:
    for name, given in (("u8", artifact), ("f32", tiny_artifact)):
        done = call("npu-runtime", "embed", given, photographs, "--output", tmp_path / f"{name}.npy")
        assert done.code == 0, done.err
    rows = np.load(tmp_path / "u8.npy")
    np.testing.assert_allclose(rows, np.load(tmp_path / "f32.npy"), atol=1e-5, rtol=0)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


def test_a_pack_for_triton_takes_bytes(call: Call, artifact: Path, tmp_path: Path) -> None:
    assert call("npu-runtime", "pack", artifact, "--for", "triton", "--output", tmp_path / "models").code == 0
    models = {backend: tmp_path / f"models/tiny-vit-fp32-uint8-{backend}-b1" for backend in ("onnxruntime", "pytorch")}
    for folder in models.values():
        described = 'input [ { name: "pixel_values" data_type: TYPE_UINT8 dims: [ 1, 32, 32, 3 ] } ]'
        assert described in (folder / "config.pbtxt").read_text("ascii")
    pixels = np.random.default_rng(0).integers(256, size=(1, 32, 32, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(models["onnxruntime"] / "1/model.onnx")
    with without_jit_deprecation(), torch.inference_mode():
        by_torch = torch.jit.load(models["pytorch"] / "1/model.pt").forward(torch.from_numpy(pixels))[0].numpy()
    for backend, row in (
        ("onnxruntime", session.run(["embedding"], {"pixel_values": pixels})[0]),
        ("torchscript", by_torch),
    ):
        with npu_runtime.load(artifact, backend=backend) as encoder:
            np.testing.assert_array_equal(row, encoder(pixels))


def test_a_report_tells_of_the_input_and_how_to_export_it_again(
    call: Call, artifact: Path, photographs: Path, tmp_path: Path
) -> None:
    record = tmp_path / "parity.json"
    assert call("npu-runtime", "parity", artifact, "--images", photographs, "--record", record).code == 0
    outputs = ("--output", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    assert call("npu-runtime", "report", artifact, record, *outputs).code == 0
    told = (tmp_path / "r.md").read_text("utf-8")
    assert " --input uint8 " in told
    assert "features = encoder(pixel_values)  # pixel_values [N, 32, 32, 3] -> embedding [N, 64]" in told
    thumbnails = [taken["thumbnails"] for taken in json.loads(record.read_text("utf-8"))["inputs"]]
    assert all(thumbnails)
    assert all(taken["preprocessed"] in (tmp_path / "r.html").read_text("utf-8") for taken in thumbnails)
