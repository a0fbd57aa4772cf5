"""Read checkpoints safely: names and shapes first, tensors one at a time, and never code."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npu_export.errors import CheckpointError

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names under which Hugging Face publishes weights, the first that exists is read."""
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FLOATING = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, read when asked for, and the published settings that lay beside them."""

    source: str
    """As the user may ask for it again: a path, `hf:ID@REVISION` or `random:SEED`."""
    file: Path | None
    """The weights file; None for random weights."""
    random_seed: int | None
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    """The tensor of a name, on the CPU and in the stored dtype. It may be a view of the mapped file."""
    config: Mapping[str, object] | None = None
    """Hugging Face's config.json; None where there is none."""
    preprocessor: Mapping[str, object] | None = None
    """Hugging Face's preprocessor_config.json; None where there is none."""


def open_checkpoint(path: Path, source: str | None = None) -> Checkpoint:
    """The checkpoint in a file, or in a folder that holds one of `WEIGHT_FILES`.

    `config.json` and `preprocessor_config.json` are read where they lie beside a published weights
    file. Raises CheckpointError for what is missing, truncated, a git-LFS pointer, not a flat mapping
    of floating-point tensors, or a pickle that needs code to load.
    """
    file = _weights_file(path)
    shapes, read = _open_file(file)
    published = file.name in WEIGHT_FILES
    return Checkpoint(
        source=source or str(path),
        file=file,
        random_seed=None,
        shapes=shapes,
        read=read,
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


def _open_file(file: Path) -> tuple[Mapping[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    try:
        with file.open("rb") as opened:
            head = opened.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError("the checkpoint cannot be read", where=file, got=error) from error
    if head == _LFS_POINTER:
        raise CheckpointError(
            "this is a git-LFS pointer, not the weights",
            where=file,
            expected="the weights themselves",
            got=f"{file.stat().st_size} bytes of text that name them",
            hint="run `git lfs pull` in that clone, or download the file from the hub",
        )
    if head[:2] == b"\x80\x02" or zipfile.is_zipfile(file) or head[:4] == b"PK\x03\x04":
        return _open_pickle(file)
    return _open_safetensors(file)


def _open_safetensors(file: Path) -> tuple[Mapping[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(
            "the file is no whole safetensors file",
            where=file,
            expected="a safetensors file, or a torch file",
            got=f"{file.stat().st_size} bytes: {error}",
            hint="the download may have stopped early; fetch it again and compare its sha256",
        ) from error
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no iterator of its own)
    _check_floating({name: _FLOATING.get(s.get_dtype(), s.get_dtype()) for name, s in slices.items()}, file)
    return {name: tuple(s.get_shape()) for name, s in slices.items()}, opened.get_tensor


def _open_pickle(file: Path) -> tuple[Mapping[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    import torch

    try:
        # Only the zip format can be memory-mapped; files from before torch 1.6 are read whole.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the pickle needs code to load, which is refused because it could do anything",
            where=file,
            expected="a state dict that torch.load(weights_only=True) reads",
            got=str(error).strip().splitlines()[0],
            hint="save model.state_dict() from a program that you trust, best as safetensors",
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
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
    _check_floating({name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}, file)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__


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
