from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import npu_runtime.parity.inputs as module
from npu_runtime import InputError, UsageError
from npu_runtime.artifact.schema import Preprocessing, TensorSpec
from npu_runtime.artifact.store import open_artifact
from npu_runtime.parity.inputs import (
    Inputs,
    array_inputs,
    image_inputs,
    reference_inputs,
    seeded_images,
    seeded_inputs,
)
from npu_runtime.preprocess import read_images

SPEC = TensorSpec("pixel_values", "float32", ("B", 3, 8, 8))
PREPROCESSING = Preprocessing((8, 8), None, "bilinear", (0.5,) * 3, (0.5,) * 3, "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of them below another folder, and a text."""
    (tmp_path / "more").mkdir()
    for index, name in enumerate(("b.png", "a.jpg", "more/c.webp")):
        Image.new("RGB", (16, 12), (40 * index, 90, 10)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image", "utf-8")
    return tmp_path


def test_a_seed_gives_the_same_image_everywhere() -> None:
    inputs = Inputs(seeded_inputs((42, 7), SPEC))
    assert [(r.name, r.kind) for r in inputs.records] == [("seed 42", "seed"), ("seed 7", "seed")]
    expected = np.random.default_rng(42).standard_normal((3, 8, 8), np.float32)
    assert np.array_equal(inputs.rows(0, 1), expected[None])
    assert inputs.records[0].sha256 == hashlib.sha256(expected.tobytes()).hexdigest()
    assert np.array_equal(inputs.rows(0, 2), seeded_images((42, 7), (3, 8, 8)))


def test_the_reference_is_the_artifacts_own_images(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    inputs = Inputs(reference_inputs(artifact))
    assert [record.name for record in inputs.records] == [f"reference {seed}" for seed in range(4)]
    assert np.array_equal(inputs.rows(0, 4), artifact.read_reference()[0])


def test_folders_give_their_images_in_order_and_no_file_twice(folder: Path) -> None:
    sources = image_inputs([folder, folder / "b.png"], PREPROCESSING)
    assert [Path(source.name).name for source in sources] == ["a.jpg", "b.png", "c.webp"]
    assert np.array_equal(Inputs(sources).rows(1, 2), read_images([folder / "b.png"], PREPROCESSING))


def test_a_folder_without_images_and_a_path_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image", "utf-8")
    with pytest.raises(InputError, match="holds no images"):
        image_inputs([tmp_path], PREPROCESSING)
    with pytest.raises(InputError, match="no such image"):
        image_inputs([tmp_path / "absent.png"], PREPROCESSING)


def test_an_image_that_cannot_be_decoded_is_named_and_the_others_are_kept(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"\x89PNG broken")
    inputs = Inputs(image_inputs([folder], PREPROCESSING))
    assert [Path(record.name).name for record in inputs.records] == ["a.jpg", "c.webp"]
    ((name, reason),) = [(skipped.name, skipped.reason) for skipped in inputs.skipped]
    assert Path(name).name == "b.png"
    assert reason


def test_nothing_but_bad_images_is_refused_with_their_reasons(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match="no input to compare on") as caught:
        Inputs(image_inputs([tmp_path], PREPROCESSING))
    assert "x.png: this file is no image" in str(caught.value.got)


def write_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), array)
    return path.with_suffix(".npy")


def write_npz(path: Path, array: np.ndarray) -> Path:
    np.savez(path.with_suffix(".npz"), pixel_values=array)
    return path.with_suffix(".npz")


def write_safetensors(path: Path, array: np.ndarray) -> Path:
    save_file({"pixel_values": array}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("write", [write_npy, write_npz, write_safetensors])
def test_arrays_are_read_from_each_kind_of_file(tmp_path: Path, write: Callable[[Path, np.ndarray], Path]) -> None:
    array = np.random.default_rng(0).standard_normal((3, 3, 8, 8), np.float32)
    inputs = Inputs(array_inputs(write(tmp_path / "x", array), SPEC))
    assert [record.kind for record in inputs.records] == ["array"] * 3
    assert inputs.records[2].name.endswith("[2]")
    assert np.array_equal(inputs.rows(0, 3), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 3, 8, 9), np.float32),
        np.zeros((3, 8, 8), np.float32),
        np.zeros((0, 3, 8, 8), np.float32),
        np.zeros((1, 3, 8, 8)),
    ],
    ids=["size", "rank", "empty", "float64"],
)
def test_arrays_of_another_shape_or_type_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(InputError, match="no input of this encoder") as caught:
        array_inputs(write_npy(tmp_path / "x", array), SPEC)
    assert (caught.value.expected, str(array.dtype) in str(caught.value.got)) == (
        "float32 [N, 3, 8, 8] with N of 1 or more",
        True,
    )


def test_files_that_hold_no_array_are_refused(tmp_path: Path) -> None:
    for name in ("x.npy", "x.npz", "x.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(InputError, match="holds no array"):
            array_inputs(tmp_path / name, SPEC)
    save_file({"other": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no array"):
        array_inputs(tmp_path / "x.safetensors", SPEC)
    with pytest.raises(UsageError, match="unknown kind"):
        array_inputs(tmp_path / "x.bin", SPEC)


def test_images_beyond_what_is_kept_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_NBYTES", 4 * 3 * 8 * 8)  # of one image
    inputs = Inputs(image_inputs([folder], PREPROCESSING))
    whole = inputs.rows(0, 3)
    (folder / "a.jpg").unlink()
    assert np.array_equal(inputs.rows(0, 1), whole[:1])
    (folder / "b.png").unlink()
    with pytest.raises(InputError):
        inputs.rows(1, 2)
