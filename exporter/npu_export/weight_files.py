"""One weights file: safetensors, a torch pickle or a numpy archive. Never code."""

from __future__ import annotations

import functools
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_export.errors import CheckpointError
from npu_export.random_weights import parse_seed
from npu_runtime.errors import first_line

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

RANDOM_SEED_METADATA = "npu_export.random_seed"
"""Under this name a safetensors file that was made from a seed says so, and is never taken for trained weights."""

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80\x02"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
FORMATS = "a safetensors file, a torch file or a numpy archive"

Read = Callable[[str], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """What a file says before its tensors are read; see `Checkpoint`, whose fields these are."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    tensors: Callable[[], AbstractContextManager[Read]]
    random_seed: int | None = None


def open_weights_file(file: Path) -> WeightsFile:
    """Names, shapes and dtypes of a file's tensors, and how to read them."""
    try:
        with file.open("rb") as opened:
            head = opened.read(1024)
    except OSError as error:
        raise CheckpointError("the checkpoint cannot be read", where=file, got=error) from error
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(
            "this is a git-LFS pointer, not the weights",
            where=file,
            expected="the weights themselves",
            got=f"{file.stat().st_size} bytes of text that name them",
            hint="run `git lfs pull` in that clone, or download the file from the hub",
        )
    if head.startswith(_ZIP) and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy"):
        return _open_npz(file)
    if head.startswith((_ZIP, _PICKLE)):
        return _open_pickle(file)
    return _open_safetensors(file)


def _open_safetensors(file: Path) -> WeightsFile:
    with _safetensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no iterator of its own)
        seed = (opened.metadata() or {}).get(RANDOM_SEED_METADATA)
        dtypes = {name: _SAFETENSORS_DTYPES.get(s.get_dtype(), s.get_dtype()) for name, s in slices.items()}
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    random_seed = None if seed is None else parse_seed(seed)
    if random_seed is None and seed is not None:
        raise CheckpointError("the file says its weights are random but gives no seed", where=file, got=repr(seed))
    return WeightsFile(shapes, dtypes, functools.partial(_read_safetensors, file), random_seed)


@contextmanager
def _read_safetensors(file: Path) -> Iterator[Read]:
    """Each tensor through a mapping of its own: the pages of one mapping count as memory until it ends."""

    def read(key: str) -> torch.Tensor:
        with _safetensors(file) as opened:
            tensor: torch.Tensor = opened.get_tensor(key)
        return tensor

    yield read


def _safetensors(file: Path) -> safe_open:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(
            "the file is no whole safetensors file",
            where=file,
            expected=FORMATS,
            got=f"{file.stat().st_size} bytes: {error}",
            hint="the download may have stopped early; fetch it again and compare its sha256",
        ) from error


def _open_npz(file: Path) -> WeightsFile:
    """Names and shapes from the headers alone; arrays are read when asked for."""
    import numpy as np

    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    key = name.removesuffix(".npy")
                    shapes[key], dtypes[key] = _npy_header(member, np.lib.format)
    except Exception as error:  # a damaged archive fails wherever its bytes lead: zlib.error, NotImplementedError, …
        raise _damaged_npz(file, error) from error
    return WeightsFile(shapes, dtypes, functools.partial(_read_npz, file))


def _npy_header(member: Any, npy_format: Any) -> tuple[tuple[int, ...], str]:
    version = npy_format.read_magic(member)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, _, dtype = read(member)
    return tuple(shape), str(dtype)


@contextmanager
def _read_npz(file: Path) -> Iterator[Read]:
    import numpy as np
    import torch

    with np.load(file, allow_pickle=False) as archive:

        def read(key: str) -> torch.Tensor:
            try:
                return torch.from_numpy(archive[key])
            except Exception as error:  # as where the headers are read
                raise _damaged_npz(file, error) from error

        yield read


def _damaged_npz(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "the file is no whole numpy archive of plain arrays",
        where=file,
        expected="arrays of numbers, as numpy.savez writes them",
        got=f"{file.stat().st_size} bytes: {error}",
        hint="the download may have stopped early; fetch it again",
    )


def _open_pickle(file: Path) -> WeightsFile:
    import torch

    leaves = _load_pickle(file)
    shapes = {key: tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else () for key, leaf in leaves.items()}
    dtypes = {
        key: str(leaf.dtype).removeprefix("torch.") if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        for key, leaf in leaves.items()
    }
    return WeightsFile(shapes, dtypes, functools.partial(_read_pickle, file))


@contextmanager
def _read_pickle(file: Path) -> Iterator[Read]:
    yield _load_pickle(file).__getitem__


def _load_pickle(file: Path) -> dict[str, Any]:
    """What a torch file holds, dicts inside of it flattened with a slash before their keys."""
    import torch

    try:
        # Only the zip format can be memory-mapped; files from before torch 1.6 are read whole.
        with file.open("rb") as opened:
            mapped = opened.read(len(_ZIP)) == _ZIP
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the pickle needs code to load, which is refused because it could do anything",
            where=file,
            expected="a state dict that torch.load(weights_only=True) reads",
            got=first_line(error),
            hint="save model.state_dict() from a program that you trust, best as safetensors",
        ) from error
    except Exception as error:  # a damaged pickle fails wherever its opcodes lead: IndexError, struct.error, …
        raise CheckpointError(
            "the file is no whole torch file",
            where=file,
            expected="a state dict written by torch.save",
            got=f"{file.stat().st_size} bytes: {first_line(error)}",
            hint="the download may have stopped early; fetch it again and compare its sha256",
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            "the torch file holds no state dict",
            where=file,
            expected="a dict of tensors by name, alone or inside of another dict",
            got=type(state).__name__,
            hint="save the state dict itself",
        )
    leaves = list(_flatten(state, ""))
    if len(leaves) != len(dict(leaves)):
        keys = [key for key, _ in leaves]
        raise CheckpointError(
            "the torch file spells two tensors alike",
            where=file,
            expected="keys that differ as text",
            got=", ".join(sorted({key for key in keys if keys.count(key) > 1})[:5]),
            hint="save the state dict itself",
        )
    return dict(leaves)


def _flatten(content: Mapping[Any, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value
