"""Read checkpoints safely: names and shapes first, tensors one at a time, and never code."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from npu_export.errors import CheckpointError
from npu_export.random_weights import parse_seed

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names under which Hugging Face publishes weights, the first that exists is read."""
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
RANDOM_SEED_METADATA = "npu_export.random_seed"
"""Under this name a safetensors file that was made from a seed says so, and is never taken for trained weights."""

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80\x02"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FLOATING = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, read when asked for, and the published settings that lay beside them."""

    source: str
    """As the user may ask for it again: a path, `hf:ID@REVISION` or `random:SEED`."""
    file: Path | None
    """The weights file; None for random weights."""
    random_seed: int | None
    """Seed of random weights; None for all others."""
    shapes: Shapes
    tensors: Callable[[], AbstractContextManager[Read]]
    """Opens the file; within the block the function it gives reads a tensor by its name, on the CPU and in
    the stored dtype. Tensors may be views of the mapped file, which stays mapped while one lives."""
    config: Mapping[str, object] | None = None
    """Hugging Face's config.json; None where there is none."""
    preprocessor: Mapping[str, object] | None = None
    """Hugging Face's preprocessor_config.json; None where there is none."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor; `tensors` is for many."""
        with self.tensors() as read:
            return read(name)


class _Opened(NamedTuple):
    """What a weights file says before its tensors are read."""

    shapes: Shapes
    tensors: Callable[[], AbstractContextManager[Read]]
    random_seed: int | None


def open_checkpoint(path: Path, source: str | None = None) -> Checkpoint:
    """The checkpoint in a file, or in a folder that holds one of `WEIGHT_FILES`.

    `config.json` and `preprocessor_config.json` are read where they lie beside a published weights
    file. Raises CheckpointError for what is missing, truncated, a git-LFS pointer, not a flat mapping
    of floating-point tensors, or a pickle that needs code to load.
    """
    file = _weights_file(path)
    opened = _open_file(file)
    published = file.name in WEIGHT_FILES
    return Checkpoint(
        source=source or str(path),
        file=file,
        random_seed=opened.random_seed,
        shapes=opened.shapes,
        tensors=opened.tensors,
        config=read_settings(file.with_name(CONFIG_FILE)) if published else None,
        preprocessor=read_settings(file.with_name(PREPROCESSOR_FILE)) if published else None,
    )


def read_settings(path: Path) -> Mapping[str, object] | None:
    """A JSON object from a file, None where the file does not exist."""
    try:
        settings = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError("the settings beside the weights cannot be read", where=path, got=error) from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            "the settings beside the weights are no JSON object", where=path, got=type(settings).__name__
        )
    return settings


def _weights_file(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(
            "there is no such checkpoint",
            where=path,
            expected=f"a file, or a folder with {' or '.join(WEIGHT_FILES)}",
            hint="check the path given with --weights",
        )
    if not path.is_dir():
        return path
    for name in WEIGHT_FILES:
        if (path / name).exists():
            return path / name
    found = sorted(p.name for p in path.iterdir())
    raise CheckpointError(
        "the folder holds no weights",
        where=path,
        expected=" or ".join(WEIGHT_FILES),
        got=", ".join(found[:8]) + (", …" if len(found) > 8 else "") if found else "an empty folder",
        hint="pass the weights file itself with --weights",
    )


def _open_file(file: Path) -> _Opened:
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
        raise CheckpointError(
            "this is a numpy archive (.npz), which no layout is read from",
            where=file,
            expected="a safetensors file, or a torch file",
            hint="use the encoder's checkpoint on the hub: leave --weights out, or download it from there",
        )
    if head.startswith((_ZIP, _PICKLE)):
        return _open_pickle(file)
    return _open_safetensors(file)


def _open_safetensors(file: Path) -> _Opened:
    with _safetensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no iterator of its own)
        seed = (opened.metadata() or {}).get(RANDOM_SEED_METADATA)
        _check_floating({name: _FLOATING.get(s.get_dtype(), s.get_dtype()) for name, s in slices.items()}, file)
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    random_seed = None if seed is None else parse_seed(seed)
    if random_seed is None and seed is not None:
        raise CheckpointError("the file says its weights are random but gives no seed", where=file, got=repr(seed))
    return _Opened(shapes, functools.partial(_read_safetensors, file), random_seed)


@contextmanager
def _read_safetensors(file: Path) -> Iterator[Read]:
    with _safetensors(file) as opened:
        yield opened.get_tensor


def _safetensors(file: Path) -> safe_open:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(
            "the file is no whole safetensors file",
            where=file,
            expected="a safetensors file, or a torch file",
            got=f"{file.stat().st_size} bytes: {error}",
            hint="the download may have stopped early; fetch it again and compare its sha256",
        ) from error


def _open_pickle(file: Path) -> _Opened:
    state = _load_pickle(file)
    _check_floating({name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}, file)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return _Opened(shapes, functools.partial(_read_pickle, file), None)


@contextmanager
def _read_pickle(file: Path) -> Iterator[Read]:
    yield _load_pickle(file).__getitem__


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
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
            got=str(error).strip().splitlines()[0],
            hint="save model.state_dict() from a program that you trust, best as safetensors",
        ) from error
    except Exception as error:  # a damaged pickle fails wherever its opcodes lead: IndexError, struct.error, …
        raise CheckpointError(
            "the file is no whole torch file",
            where=file,
            expected="a state dict written by torch.save",
            got=f"{file.stat().st_size} bytes: {str(error).strip().splitlines()[0] if str(error) else error!r}",
            hint="the download may have stopped early; fetch it again and compare its sha256",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(
            "the torch file holds no flat state dict",
            where=file,
            expected="a dict of tensors by name",
            got=f"a dict with {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, dict) else type(state),
            hint="save the state dict itself",
        )
    return state


def _check_floating(dtypes: Mapping[str, str], file: Path) -> None:
    allowed = tuple(_FLOATING.values())
    wrong = [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in allowed]
    if wrong:
        raise CheckpointError(
            "the checkpoint holds tensors of other dtypes",
            where=file,
            expected=", ".join(allowed),
            got="\n".join(wrong[:10]) + ("\n…" if len(wrong) > 10 else ""),
            hint="convert the checkpoint to float32 first",
        )
