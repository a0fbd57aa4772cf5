"""Artifacts whose programs normalise: bytes in, by every way in, and no float work before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from npu_export.pipeline import export
from npu_runtime import BadImage, InputError, preprocess
from npu_runtime.artifact.codec import decode_manifest
from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.bench.measure import INPUTS, draw_inputs
from npu_runtime.encoder import Encoder, load
from npu_runtime.errors import ArtifactError
from npu_runtime.parity.inputs import Inputs, array_inputs, image_inputs, seeded_inputs
from npu_runtime.parity.localise import localise
from npu_runtime.parity.thumbnails import make_thumbnails
from npu_runtime.preprocess import denormalise, read_images

PHOTOGRAPHS = sorted((Path(__file__).parent.parent / "data" / "photographs").glob("*.jpg"))


@pytest.fixture(scope="session")
def pixel_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact, but of programs that take uint8, with probes. Not to be changed."""
    output = tmp_path_factory.mktemp("pixels") / "tiny-vit-fp32-uint8"
    return export("tiny-vit", weights=str(tiny_checkpoint), batch=(1, 4), input="uint8", probes=True, output=output)


@pytest.fixture(params=["onnxruntime", "torchscript", "eager"])
def encoder(request: pytest.FixtureRequest, pixel_artifact: Path) -> Iterator[Encoder]:
    with load(pixel_artifact, backend=request.param) as opened:
        yield opened


@pytest.fixture
def of_pixels(pixel_artifact: Path) -> Iterator[Encoder]:
    with load(pixel_artifact) as opened:
        yield opened


@pytest.fixture
def of_floats(tiny_artifact: Path) -> Iterator[Encoder]:
    with load(tiny_artifact) as opened:
        yield opened


def pictures(count: int, *size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, *(size or (32, 32)), 3), np.uint8)


def test_features_of_images_are_those_of_the_artifact_that_is_given_what_the_host_normalised(
    encoder: Encoder, tiny_artifact: Path
) -> None:
    images = [*PHOTOGRAPHS, PHOTOGRAPHS[0].read_bytes(), *pictures(4, 40, 50), Image.open(PHOTOGRAPHS[1])]
    with load(tiny_artifact, backend=encoder.backend) as other:
        np.testing.assert_allclose(encoder.embed(images), other.embed(images), atol=1e-5, rtol=0)
        tokens = [np.stack(list(e.stream(PHOTOGRAPHS, output="tokens"))) for e in (encoder, other)]
    np.testing.assert_allclose(*tokens, atol=1e-5, rtol=0)
    images[-1].close()


def test_any_number_of_images_is_split_over_the_frozen_batches(encoder: Encoder) -> None:
    images = pictures(7)
    together = encoder(images)
    np.testing.assert_allclose(together, np.concatenate([encoder(image[None]) for image in images]), atol=1e-5)
    np.testing.assert_allclose(encoder.run(images[:3])["embedding"], together[:3], atol=1e-5)
    images.flags.writeable = False
    np.testing.assert_array_equal(encoder(images), together)
    np.testing.assert_array_equal(encoder(np.asfortranarray(images)), together)
    assert encoder(images[:0]).shape == encoder.embed([]).shape == (0, 64)


def test_the_host_does_no_float_work(of_pixels: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[np.ndarray[Any, Any]] = []
    run = of_pixels._opened().run

    def watched(pixel_values: Any, outputs: Any) -> Any:
        given.append(pixel_values)
        return run(pixel_values, outputs)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the host normalised")

    monkeypatch.setattr(of_pixels._opened(), "run", watched)
    monkeypatch.setattr(preprocess, "normalise", refuse)
    of_pixels.embed([*PHOTOGRAPHS, *pictures(4, 20, 70)])
    assert {(array.dtype, array.shape[1:]) for array in given} == {(np.dtype(np.uint8), (32, 32, 3))}
    assert sum(map(len, given)) == 6
    assert given[0].nbytes == 4 * 32 * 32 * 3
    prepared = np.concatenate(given)[: len(PHOTOGRAPHS)]
    steps = of_pixels.manifest.preprocessing
    for path, row in zip(PHOTOGRAPHS, prepared):
        with Image.open(path) as opened:
            np.testing.assert_array_equal(row, preprocess.resize_and_crop(opened.convert("RGB"), steps))


def test_pictures_of_any_size_in_arrays_and_tensors_are_cut_to_size(of_pixels: Encoder) -> None:
    batch = pictures(5, 48, 36)
    steps = of_pixels.manifest.preprocessing
    cut = np.stack([preprocess.resize_and_crop(Image.fromarray(picture), steps) for picture in batch])
    expected = of_pixels(cut)
    for images in (batch, list(batch), torch.from_numpy(batch).permute(0, 3, 1, 2)):
        np.testing.assert_array_equal(of_pixels.embed(images), expected)


@pytest.mark.parametrize(
    ("array", "what", "hint"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), "another dtype", "not normalised: the programs"),
        (np.zeros((1, 32, 32, 3), np.float32), "another dtype", "not normalised: the programs"),
        (np.zeros((1, 3, 32, 32), np.uint8), "another shape", None),
        (np.zeros((1, 32, 31, 3), np.uint8), "another shape", None),
        (np.zeros((32, 32, 3), np.uint8), "another shape", "add the batch dimension"),
        (np.zeros((1, 32, 32, 3), np.int8), "another dtype", "not normalised"),
    ],
)
def test_other_arrays_are_refused_with_what_was_expected(
    of_pixels: Encoder, array: np.ndarray[Any, Any], what: str, hint: str | None
) -> None:
    with pytest.raises(InputError, match=what) as raised:
        of_pixels(array)
    error = raised.value
    assert error.expected == "numpy uint8 [N, 32, 32, 3]"
    assert error.got == f"{array.dtype} {list(array.shape)}"
    assert (hint or "") in (error.hint or "")


def test_embed_refuses_floats_and_a_float_artifact_refuses_bytes(of_pixels: Encoder, of_floats: Encoder) -> None:
    floats = np.zeros((2, 3, 32, 32), np.float32)
    with pytest.raises(InputError, match="not what the encoder takes") as raised:
        of_pixels.embed(floats)
    error = raised.value
    assert (error.where, error.expected) == ("image 0", "a picture, uint8 [H, W, 3]")
    assert error.got == "float32 [3, 32, 32]"
    assert error.hint == "do not normalise it: the programs of this artifact do"
    rows = list(of_pixels.stream([floats[0], pictures(1)[0]], on_bad="give"))
    assert isinstance(rows[0], BadImage)
    assert rows[1].shape == (64,)
    with pytest.raises(InputError, match="another dtype") as raised:
        of_floats(pictures(1))
    assert (raised.value.expected, raised.value.got) == ("numpy float32 [N, 3, 32, 32]", "uint8 [1, 32, 32, 3]")


def test_inputs_of_parity_and_bench_are_bytes(of_pixels: Encoder, tmp_path: Path) -> None:
    spec, steps = of_pixels.manifest.inputs[0], of_pixels.manifest.preprocessing
    np.save(tmp_path / "x.npy", pictures(2))
    sources = [*seeded_inputs((42,), spec), *image_inputs(PHOTOGRAPHS[:1], steps, spec.dtype)]
    inputs = Inputs([*sources, *array_inputs(tmp_path / "x.npy", spec)])
    rows = inputs.rows(0, 4)
    assert (rows.dtype, rows.shape) == (np.uint8, (4, 32, 32, 3))
    np.testing.assert_array_equal(rows[0], np.random.default_rng(42).integers(256, size=(32, 32, 3), dtype=np.uint8))
    np.testing.assert_array_equal(rows[1:2], read_images(PHOTOGRAPHS[:1], steps, "uint8"))
    np.testing.assert_array_equal(rows[2:], pictures(2))
    assert inputs.records[1].thumbnails == make_thumbnails(
        PHOTOGRAPHS[0], read_images(PHOTOGRAPHS[:1], steps)[0], steps
    )
    for array in (np.zeros((1, 3, 32, 32), np.float32), np.zeros((1, 32, 32, 3), np.float32), pictures(1, 31, 32)):
        np.save(tmp_path / "other.npy", array)
        with pytest.raises(InputError, match="no input of this encoder") as raised:
            array_inputs(tmp_path / "other.npy", spec)
        assert raised.value.expected == "uint8 [N, 32, 32, 3] with N of 1 or more"
    drawn = draw_inputs({"onnxruntime": of_pixels}, 2, np.random.default_rng(3))
    assert (drawn.dtype, drawn.shape) == (np.uint8, (INPUTS, 2, 32, 32, 3))
    assert len(np.unique(drawn)) == 256


def test_pixels_are_what_the_host_would_have_normalised(of_pixels: Encoder) -> None:
    steps = of_pixels.manifest.preprocessing
    pixels, values = read_images(PHOTOGRAPHS, steps, "uint8"), read_images(PHOTOGRAPHS, steps)
    for row, normalised in zip(pixels, values):
        np.testing.assert_array_equal(denormalise(normalised, steps), row)
        assert denormalise(row, steps) is row


@pytest.mark.parametrize("backend", ["onnxruntime", "torchscript"])
def test_a_program_of_pixels_can_be_looked_into(pixel_artifact: Path, backend: str) -> None:
    from npu_runtime.artifact.store import open_artifact

    found = localise(open_artifact(pixel_artifact), backend=backend)
    assert found.first is None
    assert {"blocks.0", "blocks.1"} <= {boundary.module for boundary in found.boundaries}


def another_shape(document: dict[str, Any]) -> None:
    document["inputs"][0]["shape"] = ["B", 3, 32, 32]


def another_size(document: dict[str, Any]) -> None:
    document["preprocessing"]["size"] = [32, 16]


def an_output_of_bytes(document: dict[str, Any]) -> None:
    document["outputs"][0]["dtype"] = "uint8"


@pytest.mark.parametrize("change", [another_shape, another_size, an_output_of_bytes])
def test_a_manifest_with_bytes_that_are_no_pixels_is_refused(
    change: Callable[[dict[str, Any]], None], pixel_artifact: Path
) -> None:
    import json

    document = json.loads((pixel_artifact / MANIFEST_NAME).read_text("utf-8"))
    decode_manifest(json.dumps(document), "m")
    change(document)
    with pytest.raises(ArtifactError, match="values that no artifact has") as raised:
        decode_manifest(json.dumps(document), "m")
    assert str(raised.value.got).startswith("uint8 [")


def test_a_graph_of_floats_behind_a_manifest_of_pixels_is_refused(
    pixel_artifact: Path, tiny_artifact: Path, tmp_path: Path, record_again: Callable[[Path], Any]
) -> None:
    import shutil

    copy = Path(shutil.copytree(pixel_artifact, tmp_path / "copy"))
    for name in ("model.b1.onnx", "weights.onnx.data"):
        shutil.copy(tiny_artifact / name, copy / name)
    with load(record_again(copy), backend="onnxruntime") as opened, pytest.raises(ArtifactError, match="other inputs"):
        opened(pictures(1))
