"""What lies in a file, a folder or behind an index; test_weight_files.py is about what a file holds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from npu_export.checkpoint import WEIGHT_FILES, Checkpoint, open_checkpoint, shard_names
from npu_export.errors import CheckpointError
from npu_export.weights import find_weights

STATE = {"a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b.bias": torch.tensor([1.5, -2.0])}
SHARDED = [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)]
sharded = pytest.mark.parametrize(("name", "writer"), SHARDED, ids=["safetensors", "bin"])

Writer = Callable[[Mapping[str, torch.Tensor], Path], None]


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with checkpoint.tensors() as read:
        return {name: read(name) for name in checkpoint.shapes}


def assert_holds_state(checkpoint: Checkpoint) -> None:
    assert dict(checkpoint.shapes) == {"a.weight": (2, 3), "b.bias": (2,)}
    assert dict(checkpoint.dtypes) == {"a.weight": "float32", "b.bias": "float32"}
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in read_all(checkpoint).items())


def write_index(path: Path, weight_map: object, **more: object) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map, **more}))
    return path


def shard(folder: Path, name: str, writer: Writer) -> Path:
    """The state in two shards behind an index, which is returned."""
    stem, suffix = name.rsplit(".", 1)
    weight_map = {key: f"{stem}-{n}-of-2.{suffix}" for n, key in enumerate(STATE, start=1)}
    for key, file in weight_map.items():
        writer({key: STATE[key]}, folder / file)
    return write_index(folder / f"{name}.index.json", weight_map)


def test_a_file_is_its_own_checkpoint(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "renamed.ckpt")
    checkpoint = open_checkpoint(tmp_path / "renamed.ckpt")
    assert checkpoint.files == (tmp_path / "renamed.ckpt",)
    assert checkpoint.source == str(tmp_path / "renamed.ckpt")
    assert checkpoint.random_seed is None
    assert_holds_state(checkpoint)


@sharded
def test_a_folder_is_read_by_its_published_weights(name: str, writer: Writer, tmp_path: Path) -> None:
    writer(STATE, tmp_path / name)
    writer({"other": torch.zeros(1)}, tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == (tmp_path / name,)
    assert checkpoint.source == str(tmp_path)
    assert_holds_state(checkpoint)


def test_safetensors_is_read_rather_than_a_pickle_beside_it(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_holds_state(open_checkpoint(tmp_path))


def test_a_whole_file_is_read_rather_than_shards_beside_it(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    write_index(tmp_path / "model.safetensors.index.json", {"a": "absent.safetensors"})
    assert_holds_state(open_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["anything.safetensors", "PE-Lang.pt", "dinov2.pth", "weights.bin"])
def test_the_only_weights_file_of_a_folder_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    (save_file if name.endswith(".safetensors") else torch.save)(STATE, tmp_path / name)
    (tmp_path / "README.md").touch()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == (tmp_path / name,)
    assert_holds_state(checkpoint)


def test_several_weights_files_of_other_names_are_refused_unless_one_is_the_encoders_own(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file(STATE, tmp_path / name)
    with pytest.raises(CheckpointError, match="several weights files") as raised:
        open_checkpoint(tmp_path)
    assert raised.value.got == "one.safetensors, two.safetensors"
    assert "--weights" in str(raised.value.hint)
    assert open_checkpoint(tmp_path, names=("absent.pt", "two.safetensors")).files == (tmp_path / "two.safetensors",)


@sharded
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "index"])
def test_shards_are_read_as_one_checkpoint(name: str, writer: Writer, whole: bool, tmp_path: Path) -> None:
    index = shard(tmp_path, name, writer)
    checkpoint = open_checkpoint(tmp_path if whole else index)
    assert_holds_state(checkpoint)
    shards = [tmp_path / file for file in shard_names(index)]
    assert len(shards) == 2
    assert checkpoint.files == (index, *shards)
    with checkpoint.tensors() as read:
        assert torch.equal(read("b.bias"), STATE["b.bias"])
        assert torch.equal(read("a.weight"), STATE["a.weight"])


@sharded
def test_a_shard_that_is_missing_is_named(name: str, writer: Writer, tmp_path: Path) -> None:
    index = shard(tmp_path, name, writer)
    gone = shard_names(index)[1]
    (tmp_path / gone).unlink()
    with pytest.raises(CheckpointError, match="shards of the checkpoint are missing") as raised:
        open_checkpoint(tmp_path)
    assert raised.value.got == f"no {gone}"
    assert raised.value.expected == "2 files beside the index"


def test_a_shard_that_is_damaged_is_named(tmp_path: Path) -> None:
    index = shard(tmp_path, "model.safetensors", save_file)
    damaged = tmp_path / shard_names(index)[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no whole safetensors") as raised:
        open_checkpoint(tmp_path)
    assert raised.value.where == str(damaged)


@pytest.mark.parametrize(
    ("held", "got"),
    [
        ([], "b.bias in two"),
        (["c.bias"], "b.bias in two\nc.bias in two"),
        (["b.bias", "c"], "c in two"),
        (["b.bias", "a.weight"], "a.weight in two"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused_by_key(held: list[str], got: str, tmp_path: Path) -> None:
    save_file({"a.weight": STATE["a.weight"]}, tmp_path / "one")
    save_file({key: torch.ones(2) for key in held}, tmp_path / "two")
    write_index(tmp_path / "model.safetensors.index.json", {"a.weight": "one", "b.bias": "two"})
    with pytest.raises(CheckpointError, match="do not agree") as raised:
        open_checkpoint(tmp_path)
    assert raised.value.got == got


@pytest.mark.parametrize("outside", ["../model.safetensors", "sub/model.safetensors", "/etc/passwd", "..", ".", ""])
def test_an_index_that_names_files_outside_of_its_folder_is_refused(outside: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file(STATE, place / "model.safetensors")
    write_index(folder / "model.safetensors.index.json", dict.fromkeys(STATE, outside))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], "one", {"a": 1}, {"a": ["one"]}])
def test_an_index_that_names_no_shards_is_refused(weight_map: object, tmp_path: Path) -> None:
    index = write_index(tmp_path / "model.safetensors.index.json", weight_map)
    with pytest.raises(CheckpointError, match="names no shards"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "no JSON object"), ("{}", "names no")]
)
def test_an_index_that_is_no_index_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the index is empty"):
        open_checkpoint(write_index(tmp_path / "model.safetensors.index.json", {}))


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint") as raised:
        open_checkpoint(tmp_path / "absent")
    assert raised.value.where == str(tmp_path / "absent")
    assert all(name in str(raised.value) for name in WEIGHT_FILES)


@pytest.mark.parametrize(
    ("present", "got"),
    [
        ([], "an empty folder"),
        (["a.txt", "tf_model.h5"], "a.txt, tf_model.h5"),
        ([f"{n}.txt" for n in range(9)], "0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt, …"),
    ],
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


def test_settings_beside_published_weights_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).config is None
    assert open_checkpoint(tmp_path).preprocessor is None
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert open_checkpoint(path).config == {"hidden_size": 64}
        assert open_checkpoint(path).preprocessor == {"size": 32}


@sharded
def test_settings_beside_an_index_are_read(name: str, writer: Writer, tmp_path: Path) -> None:
    index = shard(tmp_path, name, writer)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    assert open_checkpoint(tmp_path).config == open_checkpoint(index).config == {"hidden_size": 64}


def test_settings_in_a_folder_belong_to_the_weights_it_holds_and_not_to_a_file_that_was_named_alone(
    tmp_path: Path,
) -> None:
    save_file(STATE, tmp_path / "mine.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    assert open_checkpoint(tmp_path).config == {"hidden_size": 64}
    assert open_checkpoint(tmp_path / "mine.safetensors").config is None
    assert open_checkpoint(tmp_path / "mine.safetensors", names=("mine.safetensors",)).config == {"hidden_size": 64}
    (tmp_path / "config.json").write_text("not even JSON")
    assert_holds_state(open_checkpoint(tmp_path / "mine.safetensors"))


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


def test_every_format_gives_the_same_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(tiny_checkpoint / "model.safetensors")
    torch.save(state, tmp_path / "zip.bin")
    torch.save(state, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    seeded = find_weights(tiny.TINY, "random:0")
    expected = {f"vit.{name}": tensor for name, tensor in read_all(seeded).items()}
    for path in (tiny_checkpoint, tmp_path / "zip.bin", tmp_path / "legacy.bin"):
        tensors = read_all(open_checkpoint(path))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
