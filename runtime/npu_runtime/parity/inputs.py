"""What outputs are compared on: seeded images, image files through the artifact's preprocessing, arrays of a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from npu_runtime.artifact.random_images import draw_images
from npu_runtime.artifact.schema import InputDtype, Preprocessing, TensorSpec
from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.decode import image_suffixes
from npu_runtime.errors import InputError, UsageError
from npu_runtime.parity.thumbnails import MOST_THUMBNAILS, Thumbnails, make_thumbnails
from npu_runtime.preprocess import read_images
from npu_runtime.steps import Silent, Steps

DEFAULT_SEEDS = (42, 123, 256, 789, 1024)
KEPT_NBYTES = 256 << 20
"""Arrays up to this size together are kept in memory; beyond it they are made again."""

InputKind = Literal["reference", "seed", "image", "array"]


@dataclass(frozen=True, slots=True)
class InputRecord:
    """One image that was run."""

    name: str
    kind: InputKind
    sha256: str
    """Of its `pixel_values`."""
    thumbnails: Thumbnails | None = None
    """Of the first MOST_THUMBNAILS image files; None for the others and in records before 1.1."""


@dataclass(frozen=True, slots=True)
class SkippedInput:
    """An image that could not be read."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class InputSource:
    """Where one image comes from."""

    name: str
    kind: InputKind
    read: Callable[[], Images]
    """Makes `pixel_values` of the input's dtype, without a batch; raises InputError."""
    picture: Callable[[Images], Thumbnails] | None = None
    """Makes thumbnails of an image file, given its `pixel_values`; None for what is no picture."""


def seeded_images(seeds: Sequence[int], shape: Sequence[int], dtype: InputDtype = "float32") -> Images:
    """Random images [N, *shape], one from each seed, the same on every machine."""
    return np.stack([draw_images(np.random.default_rng(seed), shape, dtype) for seed in seeds])


def seeded_inputs(seeds: Sequence[int], spec: TensorSpec) -> list[InputSource]:
    """An image from each seed."""
    shape = spec.of_batch(1)[1:]
    return [
        InputSource(f"seed {seed}", "seed", lambda seed=seed: seeded_images((seed,), shape, spec.dtype)[0])  # type: ignore[misc]
        for seed in seeds
    ]


def reference_inputs(artifact: Artifact) -> list[InputSource]:
    """The artifact's recorded images, whose reference outputs it holds."""
    images, _ = artifact.read_reference()
    seeds = artifact.manifest.reference.seeds
    return [
        InputSource(f"reference {seed}", "reference", lambda row=row: row)  # type: ignore[misc]
        for seed, row in zip(seeds, images)
    ]


def image_inputs(
    paths: Sequence[str | os.PathLike[str]], preprocessing: Preprocessing, dtype: InputDtype = "float32"
) -> list[InputSource]:
    """Image files, and those below folders in order of name, as the artifact preprocesses them.

    Raises InputError for a path that does not exist and for a folder without images.
    """
    files = [file for path in paths for file in _image_files(Path(path))]
    return [_image_input(file, preprocessing, dtype) for file in dict.fromkeys(files)]


def array_inputs(file: str | os.PathLike[str], spec: TensorSpec) -> list[InputSource]:
    """The images of an array of `pixel_values` in a .npy file, or under the input's name in .npz or .safetensors.

    Raises InputError when the file cannot be read or holds another shape or type.
    """
    path = Path(file)
    try:
        array = _read_array(path, spec.name)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(
            "the file holds no array that can be read",
            where=path,
            expected=f"a .npy array, or {spec.name} in a .npz or .safetensors file",
            got=error,
        ) from error
    shape = spec.of_batch(1)[1:]
    if array.dtype != spec.dtype or array.shape[1:] != shape or not len(array):
        raise InputError(
            "the array is no input of this encoder",
            where=path,
            expected=f"{spec.dtype} [N, {', '.join(map(str, shape))}] with N of 1 or more",
            got=f"{array.dtype} {list(array.shape)}",
        )
    return [
        InputSource(f"{path}[{index}]", "array", lambda index=index: np.ascontiguousarray(array[index]))  # type: ignore[misc]
        for index in range(len(array))
    ]


class Inputs:
    """Images by number. Each is read and hashed once at the start; what cannot be read is left out and named."""

    def __init__(self, sources: Sequence[InputSource], watch: Steps | None = None) -> None:
        self.records: list[InputRecord] = []
        self.skipped: list[SkippedInput] = []
        self._sources: list[InputSource] = []
        self._kept: dict[int, Images] = {}
        room, pictures = KEPT_NBYTES, 0
        advance = (watch or Silent()).count(len(sources), "images")
        for source in sources:
            thumbnails = None
            try:
                image = source.read()
                if source.picture is not None and pictures < MOST_THUMBNAILS:
                    thumbnails = source.picture(image)
                    pictures += 1
            except InputError as error:
                self.skipped.append(
                    SkippedInput(source.name, f"{error.what}: {error.got}" if error.got else error.what)
                )
                continue
            finally:
                advance(1)
            if image.nbytes <= room:
                self._kept[len(self._sources)] = image
                room -= image.nbytes
            self._sources.append(source)
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            self.records.append(InputRecord(source.name, source.kind, digest, thumbnails))
        if not self._sources:
            raise InputError(
                "there is no input to compare on",
                expected="one image or more that can be read",
                got="\n".join(f"{s.name}: {s.reason}" for s in self.skipped) or None,
            )

    def __len__(self) -> int:
        return len(self._sources)

    def rows(self, start: int, stop: int) -> Images:
        """`pixel_values` of these images."""
        return np.stack([self._image(index) for index in range(start, stop)])

    def _image(self, index: int) -> Images:
        return self._kept[index] if index in self._kept else self._sources[index].read()


def _image_input(file: Path, preprocessing: Preprocessing, dtype: InputDtype) -> InputSource:
    return InputSource(
        str(file),
        "image",
        lambda: read_images([file], preprocessing, dtype)[0],
        lambda pixel_values: make_thumbnails(file, pixel_values, preprocessing),
    )


def _image_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise InputError("there is no such image or folder", where=path)
    suffixes = image_suffixes()
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    if not found:
        raise InputError(
            "the folder holds no images",
            where=path,
            expected=f"files that end with {', '.join(sorted(suffixes)[:8])}, …",
        )
    yield from found


def _read_array(path: Path, name: str) -> Images:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)[name]
        except SafetensorError as error:
            raise ValueError(error) from error
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive[name])
    if path.suffix == ".npy":
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    raise UsageError("unknown kind of array file", where=path, expected=".npy, .npz or .safetensors", got=path.suffix)
