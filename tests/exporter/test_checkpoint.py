from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from npu_export.checkpoint import RANDOM_SEED_METADATA, WEIGHT_FILES, Checkpoint, open_checkpoint
from npu_export.errors import CheckpointError
from npu_export.weights import find_weights

STATE = {"a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b.bias": torch.tensor([1.5, -2.0])}
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:eb1eebf6a5a17b6e4d8f0fd7d4d2d2f4bf4e9a34ea4c7d7a8a5b5cf0d5b3a1c2\n"
    "size 346293852\n"
)


def save_zip(state: object, path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: object, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


def assert_holds_state(checkpoint: Checkpoint) -> None:
    assert dict(checkpoint.shapes) == {"a.weight": (2, 3), "b.bias": (2,)}
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in read_all(checkpoint).items())


@pytest.fixture(params=[save_file, save_zip, save_legacy])
def save(request: pytest.FixtureRequest) -> Callable[[object, Path], None]:
    writer: Callable[[object, Path], None] = request.param
    return writer


@pytest.mark.parametrize("name", ["pytorch_model.bin", "renamed.ckpt"])
def test_a_file_is_read_by_its_content_whatever_its_name(
    save: Callable[[object, Path], None], name: str, tmp_path: Path
) -> None:
    save(STATE, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert checkpoint.file == tmp_path / name
    assert checkpoint.source == str(tmp_path / name)
    assert checkpoint.random_seed is None
    assert_holds_state(checkpoint)


@pytest.mark.parametrize("writer", [save_zip, save_legacy])
def test_a_torch_file_that_calls_itself_safetensors_is_refused(
    writer: Callable[[object, Path], None], tmp_path: Path
) -> None:
    writer(STATE, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no whole"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "writer"),
    [("model.safetensors", save_file), ("pytorch_model.bin", save_zip), ("pytorch_model.bin", save_legacy)],
)
def test_a_folder_is_read_by_its_published_weights(
    name: str, writer: Callable[[object, Path], None], tmp_path: Path
) -> None:
    writer(STATE, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.file == tmp_path / name
    assert checkpoint.source == str(tmp_path)
    assert_holds_state(checkpoint)


def test_safetensors_is_read_rather_than_a_pickle_beside_it(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    save_zip({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_holds_state(open_checkpoint(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floating_tensors_come_in_the_stored_dtype(
    save: Callable[[object, Path], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    save({"a": torch.ones(3, dtype=dtype)}, tmp_path / "weights")
    assert open_checkpoint(tmp_path / "weights").read("a").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.int8, torch.bool, torch.complex64])
def test_tensors_of_other_dtypes_are_refused_by_name(
    save: Callable[[object, Path], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    save({"a": torch.ones(3), "b.steps": torch.ones(3).to(dtype)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="other dtypes") as raised:
        open_checkpoint(tmp_path / "weights")
    assert str(raised.value.got).startswith("b.steps ")
    assert "float32, float16, bfloat16" in str(raised.value)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint") as raised:
        open_checkpoint(tmp_path / "absent")
    assert raised.value.where == str(tmp_path / "absent")
    assert all(name in str(raised.value) for name in WEIGHT_FILES)


@pytest.mark.parametrize(
    ("present", "got"), [([], "an empty folder"), (["a.txt", "tf_model.h5"], "a.txt, tf_model.h5")]
)
def test_a_folder_without_weights_is_refused_and_what_is_there_is_said(
    present: list[str], got: str, tmp_path: Path
) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="holds no weights") as raised:
        open_checkpoint(tmp_path)
    assert raised.value.got == got


def test_a_weights_file_that_is_a_folder_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_cannot_be_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_git_lfs_pointer_is_named_as_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match="git-LFS pointer") as raised:
        open_checkpoint(tmp_path)
    assert "git lfs pull" in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"weights", b"<!doctype html><html></html>", b"\x80\x02", b"PK\x03\x04"]
)
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="the file is no whole") as raised:
        open_checkpoint(tmp_path)
    assert f"{len(content)} bytes" in str(raised.value.got)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(save: Callable[[object, Path], None], share: float, tmp_path: Path) -> None:
    state = {f"layer.{i}.weight": torch.full((16, 16), float(i)) for i in range(8)}
    save(state, tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    assert len(open_checkpoint(tmp_path / "weights").shapes) == len(state)
    (tmp_path / "weights").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "weights")


def test_a_file_one_byte_short_is_refused(save: Callable[[object, Path], None], tmp_path: Path) -> None:
    save(STATE, tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    (tmp_path / "weights").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "weights")


class MarkerOnLoad:
    """Creates a file when it is unpickled by a loader that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("writer", [save_zip, save_legacy])
def test_a_pickle_that_needs_code_is_refused_and_the_code_does_not_run(
    writer: Callable[[object, Path], None], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    writer({**STATE, "x": MarkerOnLoad(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="needs code") as raised:
        open_checkpoint(tmp_path)
    assert not marker.exists()
    assert "safetensors" in str(raised.value.hint)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_refused_and_its_code_does_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(MarkerOnLoad(marker), protocol))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        torch.ones(1),
        {"state_dict": STATE},
        {"model": STATE, "epoch": 3},
        {0: torch.ones(1)},
        {"a": torch.ones(1), "b": None},
    ],
)
@pytest.mark.parametrize("writer", [save_zip, save_legacy])
def test_what_is_no_flat_state_dict_is_refused(
    writer: Callable[[object, Path], None], content: object, tmp_path: Path
) -> None:
    writer(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no flat state dict") as raised:
        open_checkpoint(tmp_path)
    if isinstance(content, dict):
        assert ", ".join(map(repr, content)) in str(raised.value.got)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_an_npz_is_named_as_one(writer: Callable[..., None], tmp_path: Path) -> None:
    writer(tmp_path / "weights.npz", **{"Transformer/encoder_norm/bias": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"numpy archive \(\.npz\)"):
        open_checkpoint(tmp_path / "weights.npz")


def test_another_zip_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(CheckpointError, match="no whole torch file"):
        open_checkpoint(tmp_path / "weights")


def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    save: Callable[[object, Path], None], tmp_path: Path
) -> None:
    save(STATE, tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    outcomes = []
    for seed in range(60):
        damaged = bytearray(whole)
        for place in np.random.default_rng(seed).integers(0, len(whole), 4):
            damaged[place] ^= 0xFF
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            outcomes.append(isinstance(open_checkpoint(tmp_path / "damaged"), Checkpoint))
        except CheckpointError:
            outcomes.append(False)
    assert False in outcomes


def test_settings_beside_published_weights_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).config is None
    assert open_checkpoint(tmp_path).preprocessor is None
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert open_checkpoint(path).config == {"hidden_size": 64}
        assert open_checkpoint(path).preprocessor == {"size": 32}


def test_settings_beside_a_file_of_another_name_are_not_its_own(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "mine.safetensors")
    (tmp_path / "config.json").write_text("not even JSON")
    assert open_checkpoint(tmp_path / "mine.safetensors").config is None


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "no JSON object"),
        (b"null", "no JSON object"),
    ],
)
def test_settings_that_are_no_json_object_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path)
    assert raised.value.where == str(tmp_path / name)


def test_opening_reads_no_tensor_of_a_safetensors_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(STATE, file)
    checkpoint = open_checkpoint(file)
    changed = {**STATE, "b.bias": torch.tensor([7.0, 8.0])}
    save_file(changed, tmp_path / "changed")
    with file.open("r+b") as opened:
        opened.write((tmp_path / "changed").read_bytes())
    assert torch.equal(checkpoint.read("b.bias"), changed["b.bias"])


def test_opening_maps_a_zip_file_and_copies_no_tensor(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    save_zip(STATE, file)
    checkpoint = open_checkpoint(file)
    data = file.read_bytes()
    stored = STATE["b.bias"].numpy().tobytes()
    assert data.count(stored) == 1
    with file.open("r+b") as opened:
        opened.seek(data.index(stored))
        opened.write(torch.tensor([7.0, 8.0]).numpy().tobytes())
    assert torch.equal(checkpoint.read("b.bias"), torch.tensor([7.0, 8.0]))


def test_every_format_gives_the_same_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(tiny_checkpoint / "model.safetensors")
    save_zip(state, tmp_path / "zip.bin")
    save_legacy(state, tmp_path / "legacy.bin")
    expected = read_all(find_weights(tiny.TINY, "random:0"))
    for path in (tiny_checkpoint, tmp_path / "zip.bin", tmp_path / "legacy.bin"):
        tensors = read_all(open_checkpoint(path))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_file_of_random_weights_says_its_seed(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "seeded", metadata={RANDOM_SEED_METADATA: "7"})
    save_file(STATE, tmp_path / "published", metadata={"format": "pt"})
    assert open_checkpoint(tmp_path / "seeded").random_seed == 7
    assert open_checkpoint(tmp_path / "published").random_seed is None


@pytest.mark.parametrize("seed", ["", "seven", "-1", "1.5", "٣"])
def test_a_file_whose_seed_is_no_number_is_refused(seed: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "seeded", metadata={RANDOM_SEED_METADATA: seed})
    with pytest.raises(CheckpointError, match="gives no seed"):
        open_checkpoint(tmp_path / "seeded")
