from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from npu_export.errors import CheckpointError
from npu_export.weight_files import RANDOM_SEED_METADATA, WeightsFile, open_weights_file

STATE = {"a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b.bias": torch.tensor([1.5, -2.0])}
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:eb1eebf6a5a17b6e4d8f0fd7d4d2d2f4bf4e9a34ea4c7d7a8a5b5cf0d5b3a1c2\n"
    "size 346293852\n"
)

Save = Callable[[Any, Path], None]


def save_zip(state: object, path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: object, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_npz(state: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{key: tensor.numpy() for key, tensor in state.items()})


def save_compressed_npz(state: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **{key: tensor.numpy() for key, tensor in state.items()})


FORMATS: tuple[Save, ...] = (save_file, save_zip, save_legacy, save_npz, save_compressed_npz)
every_format = pytest.mark.parametrize("save", FORMATS, ids=lambda save: save.__name__)
pickles = pytest.mark.parametrize("save", [save_zip, save_legacy], ids=lambda save: save.__name__)


def read(file: WeightsFile, key: str) -> torch.Tensor:
    with file.tensors() as reading:
        return reading(key)


@every_format
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.npz", "renamed.ckpt"])
def test_a_file_is_read_by_its_content_whatever_its_name(save: Save, name: str, tmp_path: Path) -> None:
    save(STATE, tmp_path / name)
    opened = open_weights_file(tmp_path / name)
    assert dict(opened.shapes) == {"a.weight": (2, 3), "b.bias": (2,)}
    assert dict(opened.dtypes) == {"a.weight": "float32", "b.bias": "float32"}
    assert opened.random_seed is None
    assert all(torch.equal(read(opened, key), tensor) for key, tensor in STATE.items())


@pickles
def test_a_torch_file_that_calls_itself_safetensors_is_read_or_refused(save: Save, tmp_path: Path) -> None:
    """torch.load of newer releases goes by this name, of older ones by the content."""
    save(STATE, tmp_path / "model.safetensors")
    refusal, opened = None, None
    try:
        opened = open_weights_file(tmp_path / "model.safetensors")
    except CheckpointError as error:
        refusal = error.what
    assert refusal == "the file is no whole torch file" or (
        opened is not None and all(torch.equal(read(opened, key), tensor) for key, tensor in STATE.items())
    )


@every_format
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool"])
def test_tensors_come_in_the_stored_dtype_which_is_known_before(save: Save, dtype: str, tmp_path: Path) -> None:
    tensor = torch.tensor([0, 1, 1]).to(getattr(torch, dtype))
    save({"a": tensor}, tmp_path / "weights")
    opened = open_weights_file(tmp_path / "weights")
    assert opened.dtypes == {"a": dtype}
    assert read(opened, "a").dtype == tensor.dtype
    assert torch.equal(read(opened, "a"), tensor)


@pytest.mark.parametrize("save", [save_file, save_zip, save_legacy])
def test_bfloat16_is_read_where_the_format_has_it(save: Save, tmp_path: Path) -> None:
    save({"a": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "weights")
    opened = open_weights_file(tmp_path / "weights")
    assert opened.dtypes == {"a": "bfloat16"}
    assert torch.equal(read(opened, "a"), torch.ones(3, dtype=torch.bfloat16))


@every_format
def test_scalars_and_empty_tensors_have_their_shapes(save: Save, tmp_path: Path) -> None:
    save({"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3)}, tmp_path / "weights")
    opened = open_weights_file(tmp_path / "weights")
    assert dict(opened.shapes) == {"scalar": (), "empty": (0, 3)}
    assert read(opened, "scalar").item() == 2.0
    assert read(opened, "empty").shape == (0, 3)


@pickles
def test_dicts_inside_a_pickle_add_their_names_and_what_is_no_tensor_its_type(save: Save, tmp_path: Path) -> None:
    content = {
        "model": OrderedDict(STATE),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "name": "run",
        "best": None,
        "empty": {},
    }
    save(content, tmp_path / "weights")
    opened = open_weights_file(tmp_path / "weights")
    assert dict(opened.dtypes) == {
        "model/a.weight": "float32",
        "model/b.bias": "float32",
        "optimizer/state/0/exp_avg": "float32",
        "optimizer/param_groups": "list",
        "epoch": "int",
        "name": "str",
        "best": "NoneType",
    }
    assert opened.shapes["model/a.weight"] == (2, 3)
    assert opened.shapes["epoch"] == opened.shapes["optimizer/param_groups"] == ()
    assert torch.equal(read(opened, "model/b.bias"), STATE["b.bias"])


@pickles
@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({0: torch.ones(1), "0": torch.zeros(1)}, "0"),
        ({"model": {"a": torch.ones(1)}, "model/a": torch.zeros(1)}, "model/a"),
    ],
)
def test_keys_that_collide_as_text_are_refused(content: object, got: str, save: Save, tmp_path: Path) -> None:
    save(content, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="spells two tensors alike") as raised:
        open_weights_file(tmp_path / "weights")
    assert raised.value.got == got


@pickles
@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), 3, None])
def test_a_pickle_that_holds_no_dict_is_refused(content: object, save: Save, tmp_path: Path) -> None:
    save(content, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="no state dict") as raised:
        open_weights_file(tmp_path / "weights")
    assert raised.value.got == type(content).__name__


class MarkerOnLoad:
    """Creates a folder when it is unpickled by a loader that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


@pickles
def test_a_pickle_that_needs_code_is_refused_and_the_code_does_not_run(save: Save, tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "weights"
    save({**STATE, "x": MarkerOnLoad(marker)}, file)
    with pytest.raises(CheckpointError, match="needs code") as raised:
        open_weights_file(file)
    assert not marker.exists()
    assert "safetensors" in str(raised.value.hint)
    torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_refused_and_its_code_does_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "weights").write_bytes(pickle.dumps(MarkerOnLoad(marker), protocol))
    with pytest.raises(CheckpointError):
        open_weights_file(tmp_path / "weights")
    assert not marker.exists()


@pytest.mark.parametrize("save", [save_npz, save_compressed_npz])
def test_an_object_array_is_refused_and_its_code_does_not_run(save: Save, tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "weights.npz"
    objects = np.array([MarkerOnLoad(marker)], dtype=object)
    with file.open("wb") as opened:
        np.savez(opened, a=np.ones(3, np.float32), b=objects)
    weights = open_weights_file(file)
    assert weights.dtypes["b"] == "object"
    assert read(weights, "a").shape == (3,)
    with pytest.raises(CheckpointError, match="no whole numpy archive of plain arrays"):
        read(weights, "b")
    assert not marker.exists()


def test_the_keys_of_an_npz_keep_their_slashes_and_lose_the_suffix(tmp_path: Path) -> None:
    save_npz({"Transformer/encoder_norm/bias": torch.ones(3), "cls.npy": torch.ones(1, 1, 3)}, tmp_path / "weights")
    opened = open_weights_file(tmp_path / "weights")
    assert dict(opened.shapes) == {"Transformer/encoder_norm/bias": (3,), "cls.npy": (1, 1, 3)}
    assert torch.equal(read(opened, "cls.npy"), torch.ones(1, 1, 3))


def test_an_array_in_the_order_of_fortran_is_the_same_array(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    with (tmp_path / "weights").open("wb") as file:
        np.savez(file, a=array)
    opened = open_weights_file(tmp_path / "weights")
    assert opened.shapes == {"a": (2, 3)}
    assert torch.equal(read(opened, "a"), torch.arange(6, dtype=torch.float32).reshape(2, 3))


@pytest.mark.parametrize("save", [save_file, save_zip, save_npz])
def test_opening_reads_no_values(save: Save, tmp_path: Path) -> None:
    """Values that change in the file after it was opened are those that are read."""
    file = tmp_path / "weights"
    save(STATE, file)
    opened = open_weights_file(file)
    stored, changed = (tensor.numpy().tobytes() for tensor in (STATE["b.bias"], torch.tensor([7.0, 8.0])))
    data = file.read_bytes()
    assert data.count(stored) == 1
    with file.open("r+b") as writing:
        writing.seek(data.index(stored))
        writing.write(changed)
    if save is save_npz:  # whose checksum is seen to fail where the array is read
        with pytest.raises(CheckpointError, match="no whole numpy archive"):
            read(opened, "b.bias")
    else:
        assert torch.equal(read(opened, "b.bias"), torch.tensor([7.0, 8.0]))
    assert torch.equal(read(opened, "a.weight"), STATE["a.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.npz"])
def test_a_git_lfs_pointer_is_named_as_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match="git-LFS pointer") as raised:
        open_weights_file(tmp_path / name)
    assert "git lfs pull" in str(raised.value)
    assert f"{len(LFS_POINTER)} bytes" in str(raised.value.got)


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"weights", b"<!doctype html><html></html>", b"\x80\x02", b"PK\x03\x04"]
)
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(CheckpointError, match="the file is no whole") as raised:
        open_weights_file(tmp_path / "weights")
    assert f"{len(content)} bytes" in str(raised.value.got)


@pytest.mark.parametrize(("member", "message"), [("readme.txt", "no whole torch file"), ("a.npy", "no whole numpy")])
def test_another_zip_file_is_refused(member: str, message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights", "w") as archive:
        archive.writestr(member, "no weights")
    with pytest.raises(CheckpointError, match=message):
        open_weights_file(tmp_path / "weights")


@every_format
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(save: Save, share: float, tmp_path: Path) -> None:
    state = {f"layer.{i}.weight": torch.full((16, 16), float(i)) for i in range(8)}
    save(state, tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    assert len(open_weights_file(tmp_path / "weights").shapes) == len(state)
    for nbytes in (int(len(whole) * share), len(whole) - 1):
        (tmp_path / "weights").write_bytes(whole[:nbytes])
        with pytest.raises(CheckpointError):
            open_weights_file(tmp_path / "weights")


@every_format
def test_a_damaged_file_is_read_or_refused_and_nothing_else(save: Save, tmp_path: Path) -> None:
    save(STATE, tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    refused = 0
    for seed in range(150):
        damaged = bytearray(whole)
        for place in np.random.default_rng(seed).integers(0, len(whole), 4):
            damaged[place] ^= 0xFF
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            opened = open_weights_file(tmp_path / "damaged")
            for key, dtype in opened.dtypes.items():
                if dtype == "float32":
                    assert read(opened, key).shape == opened.shapes[key]
        except CheckpointError:
            refused += 1
    assert refused > 0


def test_a_file_of_random_weights_says_its_seed(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "seeded", metadata={RANDOM_SEED_METADATA: "7"})
    save_file(STATE, tmp_path / "published", metadata={"format": "pt"})
    assert open_weights_file(tmp_path / "seeded").random_seed == 7
    assert open_weights_file(tmp_path / "published").random_seed is None


@pytest.mark.parametrize("seed", ["", "seven", "-1", "1.5", "٣"])
def test_a_file_whose_seed_is_no_number_is_refused(seed: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "seeded", metadata={RANDOM_SEED_METADATA: seed})
    with pytest.raises(CheckpointError, match="gives no seed"):
        open_weights_file(tmp_path / "seeded")
