"""Programs of pixels: that they normalise as the host does, and that the gate notices where they do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch

import npu_runtime
from npu_export import normalisation
from npu_export.encoders import ENCODERS
from npu_export.encoders.spec import EncoderSpec
from npu_export.network import load_network, plan_weights
from npu_export.normalisation import FromPixels, with_input
from npu_export.onnx import export_graph
from npu_export.pipeline import export
from npu_export.precision import in_precision
from npu_export.torchscript import trace_frozen
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Precision, Preprocessing, TensorSpec, input_spec
from npu_runtime.artifact.store import open_artifact
from npu_runtime.errors import ParityError
from npu_runtime.preprocess import normalise

PUBLISHED = list(
    {
        (p.mean, p.std): dataclasses.replace(p, size=(16, 48), shortest_edge=None)
        for e in ENCODERS
        for p in e.preprocessing
    }.values()
)
ODD = dataclasses.replace(PUBLISHED[0], mean=(0.1, 0.7071, -3.0), std=(0.333, 1e-3, 57.0))


class Itself(torch.nn.Module):
    """An encoder whose output is what it is given."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        return (pixel_values + 0.0,)


def every_level(preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    """One image in which each channel holds each of the 256 levels, in an order of its own."""
    generator = np.random.default_rng(0)
    channels = [generator.permutation(np.arange(16 * 48) % 256).reshape(16, 48) for _ in range(3)]
    return np.stack(channels, -1).astype(np.uint8)[None]


def by_the_host(pixels: np.ndarray[Any, Any], preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    rows = np.empty((len(pixels), 3, *preprocessing.size), np.float32)
    for row, image in zip(rows, pixels):
        normalise(image, preprocessing, out=row)
    return rows


@pytest.mark.parametrize("preprocessing", [*PUBLISHED, ODD], ids=lambda p: "-".join(f"{m:g}" for m in p.mean))
def test_every_level_is_normalised_as_by_the_host_bit_for_bit(preprocessing: Preprocessing) -> None:
    pixels = every_level(preprocessing)
    expected = by_the_host(pixels, preprocessing)
    assert all(len(np.unique(channel)) == 256 for channel in expected[0])
    module = FromPixels(Itself(), preprocessing)
    spec = input_spec("uint8", preprocessing.size)
    with torch.inference_mode():
        (eager,) = module(torch.from_numpy(pixels))
        (frozen,) = trace_frozen(module, spec, (1,)).b1(torch.from_numpy(pixels))
    outputs = (TensorSpec("y", "float32", ("B", 3, *preprocessing.size)),)
    model, _ = export_graph(module, spec, outputs, 1, 18)
    assert [node.op_type for node in model.graph.all_nodes()][:5] == ["Transpose", "Cast", "Div", "Sub", "Div"]
    session = open_session(model)
    for got in (eager.numpy(), frozen.numpy(), session.run(None, {"pixel_values": pixels})[0]):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)
    assert eager.is_contiguous()


def open_session(model: Any) -> onnxruntime.InferenceSession:
    import onnx_ir

    return onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def test_the_module_itself_takes_float32() -> None:
    module = Itself()
    assert with_input(module, "float32", ODD) is module


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_programs_of_pixels_agree_with_the_eager_network_on_what_the_host_makes_of_them(
    encoder: EncoderSpec, precision: Precision, tmp_path: Path
) -> None:
    output = export(
        encoder.name,
        weights="random:0",
        formats=("torchscript",) if precision == "bf16" else ("torchscript", "onnx"),
        batch=(1, 2) if precision == "fp32" else (1,),
        precision=precision,
        input="uint8",
        output=tmp_path / "u8",
    )
    artifact = open_artifact(output)
    manifest, size = artifact.manifest, encoder.image_size
    assert manifest.inputs == (TensorSpec("pixel_values", "uint8", ("B", size, size, 3)),)
    pixels, stored = artifact.read_reference()
    for seed, image in zip(manifest.reference.seeds, pixels):
        drawn = np.random.default_rng(seed).integers(256, size=(size, size, 3), dtype=np.uint8)
        np.testing.assert_array_equal(image, drawn)

    def network() -> torch.nn.Module:
        return encoder.with_outputs(load_network(plan_weights(encoder, find_weights(encoder, "random:0"))))

    host = by_the_host(pixels, manifest.preprocessing)
    assert_same(run_each(network(), host), stored)
    with npu_runtime.load(artifact, backend="torchscript", batches=[1]) as opened:
        assert_same(run_each(in_precision(network(), precision), host), opened.run(pixels))
    coverage = manifest.provenance.weights.coverage
    assert coverage.matched + coverage.transformed + coverage.dropped == len(find_weights(encoder, "random:0").shapes)


def run_each(module: torch.nn.Module, images: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Outputs in the module's order, of images that are run by themselves."""
    with torch.inference_mode():
        rows = [module(torch.from_numpy(image[None])) for image in images]
    return [torch.cat(parts).numpy() for parts in zip(*rows)]


def assert_same(outputs: list[np.ndarray[Any, Any]], named: dict[str, Any]) -> None:
    """The outputs are those of a manifest's order, bit for bit."""
    assert len(outputs) == len(named)
    for array, (name, expected) in zip(outputs, named.items()):
        np.testing.assert_array_equal(array, expected, err_msg=name)


def reversed_channels(self: FromPixels, pixel_values: torch.Tensor) -> Any:
    return self.encoder((pixel_values.flip(-1).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std)


def a_scale_of_256(self: FromPixels, pixel_values: torch.Tensor) -> Any:
    return self.encoder((pixel_values.permute(0, 3, 1, 2).float() / 256 - self.mean) / self.std)


def the_sides_swapped(self: FromPixels, pixel_values: torch.Tensor) -> Any:
    return self.encoder((pixel_values.permute(0, 3, 2, 1).float() / 255 - self.mean) / self.std)


@pytest.mark.parametrize("forward", [reversed_channels, a_scale_of_256, the_sides_swapped])
def test_programs_that_read_pixels_otherwise_are_refused(
    forward: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FromPixels, "forward", forward)
    with pytest.raises(ParityError):
        export("tiny-vit", weights="random:3", formats=("torchscript",), input="uint8", output=tmp_path / "u8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("formats", [("torchscript",), ("onnx",)])
def test_a_mean_or_deviation_that_is_one_in_a_thousand_off_is_refused(
    name: str, formats: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: torch.nn.Module, dtype: Any, preprocessing: Preprocessing) -> torch.nn.Module:
        first, *rest = getattr(preprocessing, name)
        return FromPixels(module, dataclasses.replace(preprocessing, **{name: (first * 1.001, *rest)}))

    monkeypatch.setattr(normalisation, "with_input", wrong)
    with pytest.raises(ParityError):
        export("tiny-vit", weights="random:3", formats=formats, input="uint8", output=tmp_path / "u8")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_named_for_an_input_that_is_not_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export("tiny-vit", weights="random:3", formats=("torchscript",), input="uint8").name == "tiny-vit-fp32-uint8"
    manifest = json.loads((tmp_path / "tiny-vit-fp32-uint8" / "manifest.json").read_text("utf-8"))
    assert manifest["inputs"] == [{"name": "pixel_values", "dtype": "uint8", "shape": ["B", 32, 32, 3], "groups": []}]
