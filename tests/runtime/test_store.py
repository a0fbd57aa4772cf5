from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npu_runtime.artifact.store as store
from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.artifact.store import Artifact, open_artifact, record_file, sha256_file
from npu_runtime.errors import ArtifactError
from npu_runtime.steps import Advance

FILES = ("model.b1.onnx", "model.b4.onnx", "model.ts", "reference.safetensors", "weights.onnx.data")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_whole_artifact_passes_its_checks(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    artifact.check_files()
    assert sorted(record.file for record in artifact.manifest.files) == sorted(FILES)


def test_the_digest_is_that_of_the_manifest(tiny_artifact: Path) -> None:
    expected = hashlib.sha256((tiny_artifact / MANIFEST_NAME).read_bytes()).hexdigest()
    assert open_artifact(str(tiny_artifact)).digest == expected


def test_a_missing_folder_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no such folder") as caught:
        open_artifact(tmp_path / "absent")
    assert caught.value.where == str(tmp_path / "absent")


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact here"):
        open_artifact(tmp_path)


def test_a_file_is_no_artifact(tiny_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact here"):
        open_artifact(tiny_artifact / "model.ts")


def test_a_manifest_that_is_a_folder_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(ArtifactError, match="the manifest cannot be read"):
        open_artifact(tmp_path)


def test_a_manifest_that_is_not_utf8_is_refused(artifact_copy: Path) -> None:
    (artifact_copy / MANIFEST_NAME).write_bytes((artifact_copy / MANIFEST_NAME).read_bytes() + b"\xff")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_in_any_file_is_found(artifact_copy: Path, name: str) -> None:
    flip_a_byte(artifact_copy / name)
    artifact = open_artifact(artifact_copy)
    with pytest.raises(ArtifactError, match="has changed") as caught:
        artifact.check_files()
    assert caught.value.where == str(artifact_copy / name)
    artifact.check_files(set(FILES) - {name})


def test_a_truncated_file_is_found(artifact_copy: Path) -> None:
    with (artifact_copy / "model.ts").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match="another size") as caught:
        open_artifact(artifact_copy).checked_path("model.ts")
    assert caught.value.got == "100 bytes"


def test_a_missing_file_is_found(artifact_copy: Path) -> None:
    (artifact_copy / "model.ts").unlink()
    with pytest.raises(ArtifactError, match="lacks a file"):
        open_artifact(artifact_copy).check_files()


def test_a_folder_in_place_of_a_file_is_found(artifact_copy: Path) -> None:
    (artifact_copy / "model.ts").unlink()
    (artifact_copy / "model.ts").mkdir()
    with pytest.raises(ArtifactError, match="lacks a file"):
        open_artifact(artifact_copy).checked_path("model.ts")


def test_a_link_that_leaves_the_folder_is_refused(artifact_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.ts"
    shutil.move(artifact_copy / "model.ts", outside)
    (artifact_copy / "model.ts").symlink_to(outside)
    with pytest.raises(ArtifactError, match="link to a place outside"):
        open_artifact(artifact_copy).checked_path("model.ts")


def test_a_link_inside_the_folder_is_followed(artifact_copy: Path) -> None:
    (artifact_copy / "model.ts").rename(artifact_copy / "blob")
    (artifact_copy / "model.ts").symlink_to("blob")
    assert open_artifact(artifact_copy).checked_path("model.ts") == artifact_copy / "model.ts"


def test_an_artifact_behind_a_link_is_opened(tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_artifact)
    open_artifact(tmp_path / "link").check_files()
    assert open_artifact(tmp_path / "link").digest == open_artifact(tiny_artifact).digest


def test_each_file_is_hashed_once_for_each_opened_artifact(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(store, "sha256_file", lambda path, *_: hashed.append(path.name) or sha256_file(path))
    artifact = open_artifact(tiny_artifact)
    assert hashed == []
    artifact.checked_path("model.ts")
    artifact.check_files()
    artifact.check_files()
    assert sorted(hashed) == sorted(FILES)
    open_artifact(tiny_artifact).checked_path("model.ts")
    assert hashed.count("model.ts") == 2


def test_a_recorded_file_is_hashed_again_only_when_it_was_written_since_or_is_not_the_manifests(
    artifact_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = [record_file(artifact_copy, name) for name in FILES]
    hashed: list[str] = []
    monkeypatch.setattr(store, "sha256_file", lambda path, *_: hashed.append(path.name) or sha256_file(path))
    open_artifact(artifact_copy, recorded).check_files()
    assert hashed == []

    flip_a_byte(artifact_copy / "model.ts")
    with pytest.raises(ArtifactError, match="has changed"):
        open_artifact(artifact_copy, recorded).checked_path("model.ts")
    with pytest.raises(ArtifactError, match="has changed"):  # recorded as it is now, which the manifest does not say
        open_artifact(artifact_copy, [record_file(artifact_copy, "model.ts")]).checked_path("model.ts")


def test_a_file_written_while_it_was_recorded_is_hashed_again(
    artifact_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_meanwhile(path: Path, advance: Advance) -> str:
        sha256 = sha256_file(path, advance)
        flip_a_byte(path)
        return sha256

    with monkeypatch.context() as patch:
        patch.setattr(store, "sha256_file", write_meanwhile)
        recorded = [record_file(artifact_copy, "model.ts")]
    with pytest.raises(ArtifactError, match="has changed"):
        open_artifact(artifact_copy, recorded).checked_path("model.ts")


def test_a_file_that_was_replaced_since_its_check_is_checked_again(artifact_copy: Path) -> None:
    artifact = open_artifact(artifact_copy)
    artifact.check_files()
    other = artifact_copy / "other"
    shutil.copy(artifact_copy / "model.ts", other)
    flip_a_byte(other)
    shutil.copystat(artifact_copy / "model.ts", other)
    other.rename(artifact_copy / "model.ts")
    with pytest.raises(ArtifactError, match="has changed"):
        artifact.checked_path("model.ts")
    artifact.checked_path("model.b1.onnx")


def test_a_file_that_failed_its_check_is_checked_again(artifact_copy: Path) -> None:
    artifact = open_artifact(artifact_copy)
    flip_a_byte(artifact_copy / "model.ts")
    for _ in range(2):
        with pytest.raises(ArtifactError, match="has changed"):
            artifact.checked_path("model.ts")
    flip_a_byte(artifact_copy / "model.ts")
    assert artifact.checked_path("model.ts").is_file()


def test_the_hash_of_a_file_larger_than_the_buffer_is_that_of_all_its_bytes(tmp_path: Path) -> None:
    data = os.urandom((2 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    record, _ = record_file(tmp_path, "large")
    assert (record.file, record.nbytes) == ("large", len(data))
    assert record.sha256 == hashlib.sha256(data).hexdigest()


def test_the_reference_holds_the_seeded_images_and_the_outputs(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    inputs, outputs = artifact.read_reference()
    for seed, image in zip(artifact.manifest.reference.seeds, inputs):
        np.testing.assert_array_equal(image, np.random.default_rng(seed).standard_normal((3, 32, 32), np.float32))
    assert {name: array.shape for name, array in outputs.items()} == {"embedding": (4, 64), "tokens": (4, 17, 64)}
    np.testing.assert_array_equal(outputs["embedding"], outputs["tokens"][:, 0])


@pytest.mark.parametrize("damage", ["dtype", "shape", "rows", "absent"])
def test_a_reference_other_than_the_manifest_says_is_refused(
    artifact_copy: Path, record_again: Callable[[Path], Artifact], damage: str
) -> None:
    file = artifact_copy / "reference.safetensors"
    tensors = load_file(file)
    tokens = tensors.pop("tokens")
    if damage != "absent":
        changed = {"dtype": tokens.astype(np.float64), "shape": tokens[:, 1:], "rows": tokens[1:]}
        tensors["tokens"] = np.ascontiguousarray(changed[damage])
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match="does not hold tokens") as caught:
        record_again(artifact_copy).read_reference()
    assert caught.value.expected == "float32 [4, 17, 64]"


def test_a_reference_that_is_no_safetensors_file_is_refused(
    artifact_copy: Path, record_again: Callable[[Path], Artifact]
) -> None:
    (artifact_copy / "reference.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        record_again(artifact_copy).read_reference()


def test_a_changed_reference_is_refused_before_it_is_read(artifact_copy: Path) -> None:
    flip_a_byte(artifact_copy / "reference.safetensors")
    with pytest.raises(ArtifactError, match="has changed"):
        open_artifact(artifact_copy).read_reference()
