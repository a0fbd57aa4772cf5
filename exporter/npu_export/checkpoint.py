"""Open checkpoints: what lies in a file or folder, its names and shapes first, tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npu_export.errors import CheckpointError
from npu_export.weight_files import Read, WeightsFile, open_weights_file

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names under which Hugging Face publishes weights, the first that exists is read."""
INDEX_SUFFIX = ".index.json"
"""Behind the name of a weights file: a JSON object whose `weight_map` names the shard of each tensor."""
USUAL_FILES = (*WEIGHT_FILES, *(name + INDEX_SUFFIX for name in WEIGHT_FILES))
"""What a published folder is looked through for, in this order."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")
"""Names that end so may hold weights, where a folder has none of the usual names."""
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"

CONTAINERS = tuple(f"{name}/" for name in ("state_dict", "model", "weights", "ema", "model_ema"))
"""Dicts in which training programs keep the state dict. A slash stands between a dict and its keys."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, read when asked for, and the published settings that lay beside them."""

    source: str
    """As the user may ask for it again: a path, `hf:ID@REVISION` or `random:SEED`."""
    files: tuple[Path, ...]
    """The weights file, or the index and its shards; empty for random weights."""
    random_seed: int | None
    """Seed of random weights; None for all others."""
    shapes: Mapping[str, tuple[int, ...]]
    """By key; a dict inside the file adds its name and a slash."""
    dtypes: Mapping[str, str]
    """By key, as torch or numpy names them; the Python type of what is no tensor."""
    tensors: Callable[[], AbstractContextManager[Read]]
    """Opens the files; within the block the function it gives reads a tensor by its name, on the CPU and
    in the stored dtype. Tensors may be views of the mapped file, which stays mapped while one lives."""
    config: Mapping[str, object] | None = None
    """The config.json of Hugging Face or timm; None where there is none."""
    preprocessor: Mapping[str, object] | None = None
    """Hugging Face's preprocessor_config.json; None where there is none."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor; `tensors` is for many."""
        with self.tensors() as read:
            return read(name)


def open_checkpoint(path: Path, source: str | None = None, names: tuple[str, ...] = ()) -> Checkpoint:
    """The checkpoint in a file, a shards' index or a folder.

    In a folder, the first of `WEIGHT_FILES`, their indexes and `names` is read, else its only weights file.
    `config.json` and `preprocessor_config.json` are read where they lie beside a published weights file.
    Raises CheckpointError for what is missing, truncated, a git-LFS pointer, a pickle that needs code to
    load, or a folder with several weights files of other names.
    """
    file = _weights_file(path, names)
    shards = _shards(file) if file.name.endswith(INDEX_SUFFIX) else {}
    opened = {name: open_weights_file(name) for name in (dict.fromkeys(shards.values()) or (file,))}
    file_of = {key: name for name, content in opened.items() for key in content.shapes}
    _check_index(file, shards, opened)
    seeds = {content.random_seed for content in opened.values()}
    published = path.is_dir() or file.name.removesuffix(INDEX_SUFFIX) in (*WEIGHT_FILES, *names)
    return Checkpoint(
        source=source or str(path),
        files=(file, *opened) if shards else (file,),
        random_seed=max((seed for seed in seeds if seed is not None), default=None),
        shapes={key: shape for content in opened.values() for key, shape in content.shapes.items()},
        dtypes={key: dtype for content in opened.values() for key, dtype in content.dtypes.items()},
        tensors=lambda: _read_files(opened, file_of),
        config=read_json(file.with_name(CONFIG_FILE)) if published else None,
        preprocessor=read_json(file.with_name(PREPROCESSOR_FILE)) if published else None,
    )


def shard_names(index: Path) -> list[str]:
    """Names of the files that an index names, each once."""
    return list(dict.fromkeys(path.name for path in _shards(index, exist=False).values()))


def read_json(path: Path) -> Mapping[str, object] | None:
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


@contextmanager
def _read_files(opened: Mapping[Path, WeightsFile], file_of: Mapping[str, Path]) -> Iterator[Read]:
    with ExitStack() as stack:
        readers: dict[Path, Read] = {}

        def read(key: str) -> torch.Tensor:
            file = file_of[key]
            if file not in readers:
                readers[file] = stack.enter_context(opened[file].tensors())
            return readers[file](key)

        yield read
        readers.clear()


def _weights_file(path: Path, names: tuple[str, ...]) -> Path:
    usual = (*USUAL_FILES, *names)
    if not path.exists():
        raise CheckpointError(
            "there is no such checkpoint",
            where=path,
            expected=f"a file, or a folder with {' or '.join(usual)}",
            hint="check the path given with --weights",
        )
    if not path.is_dir():
        return path
    for name in usual:
        if (path / name).exists():
            return path / name
    found = sorted(p.name for p in path.iterdir())
    weights = [name for name in found if name.endswith(SUFFIXES)]
    if len(weights) == 1:
        return path / weights[0]
    listed = weights or found
    raise CheckpointError(
        "the folder holds several weights files" if weights else "the folder holds no weights",
        where=path,
        expected=" or ".join(usual),
        got=", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") if listed else "an empty folder",
        hint="pass the weights file itself with --weights",
    )


def _shards(index: Path, *, exist: bool = True) -> dict[str, Path]:
    """The shard of each key. Raises CheckpointError for an index that is none, and for shards that are not there."""
    content = read_json(index) or {}
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            "the index names no shards",
            where=index,
            expected="an object `weight_map` of file names by key",
            got=", ".join(content) or "nothing",
        )
    outside = sorted({name for name in weight_map.values() if Path(name).name != name or name in ("", "..")})
    if outside or not weight_map:
        raise CheckpointError(
            "the index names files outside of its folder" if outside else "the index is empty",
            where=index,
            expected="file names without a folder",
            got=", ".join(outside) or None,
        )
    shards = {key: index.with_name(name) for key, name in weight_map.items()}
    missing = sorted({path.name for path in shards.values() if not path.exists()}) if exist else []
    if missing:
        raise CheckpointError(
            "shards of the checkpoint are missing",
            where=index,
            expected=f"{len(set(shards.values()))} files beside the index",
            got=f"no {', '.join(missing)}",
            hint="the download may have stopped early; fetch the missing files",
        )
    return shards


def _check_index(index: Path, shards: Mapping[str, Path], opened: Mapping[Path, WeightsFile]) -> None:
    """Each shard holds the keys that the index says, and no others."""
    if not shards:
        return
    held = {(key, file) for file, content in opened.items() for key in content.shapes}
    wrong = sorted(f"{key} in {file.name}" for key, file in held ^ set(shards.items()))
    if wrong:
        raise CheckpointError(
            "the index and its shards do not agree",
            where=index,
            expected="each key in the file that the index names, and nowhere else",
            got="\n".join(wrong[:10]) + ("\n…" if len(wrong) > 10 else ""),
            hint="the shards may be of another checkpoint; fetch index and shards together",
        )
