"""Artifacts on disk: open a folder, check its files, read its reference."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.codec import decode_manifest
from npu_runtime.artifact.schema import MANIFEST_NAME, FileRecord, Manifest, Probes
from npu_runtime.errors import ArtifactError
from npu_runtime.steps import BYTES, Advance, Silent, Steps, unwatched

Array = npt.NDArray[np.float32]
Images = npt.NDArray[np.float32 | np.uint8]
"""`pixel_values` as the manifest's input has them: float32 [N, 3, H, W], or uint8 [N, H, W, 3]."""
Stamp = tuple[int, ...]
"""What changes when a file is written or replaced: device, inode, size, times of writing and of change."""


class RecordedFile(NamedTuple):
    """A file as this process hashed it."""

    record: FileRecord
    stamp: Stamp | None
    """As the hashing began, so that a file written meanwhile is hashed again."""


class ProbeRecord(NamedTuple):
    """What the reference network gave at a boundary, for each of the reference's N images."""

    sketch: npt.NDArray[np.float64]
    """[N, K], as parity/sketch.py makes them, of the output over `scale`."""
    norm: npt.NDArray[np.float64]
    """[N], of the output over `scale`."""
    scale: npt.NDArray[np.float32] = np.ones((), np.float32)
    """By which an image's output is divided, so that massive channels do not hide the others: [D] of [..., D],
    [C, 1] of [C, ...], or 1 for all, as in artifacts before 2.5."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact folder whose manifest has been read. Files are checked when they are asked for."""

    path: Path
    manifest: Manifest
    digest: str
    """sha256 of manifest.json, which holds the hash of every other file."""
    _checked: dict[str, Stamp] = field(default_factory=dict, repr=False, compare=False)
    """File -> its stamp when it was found as the manifest says."""

    def checked_path(self, name: str, advance: Advance = unwatched) -> Path:
        """Path of a listed file, after its size and sha256 were found as the manifest says.

        A file is hashed once for each opened artifact, and again when it was written or replaced since.
        `advance` is told of its bytes. Raises ArtifactError when it is missing, changed, or a link that leaves the
        folder.
        """
        record = next(record for record in self.manifest.files if record.file == name)
        path = self.path / name
        stamp = _stamp(path)
        if stamp is None or self._checked.get(name) != stamp:
            _check_file(self.path, path, record, advance)
            if stamp is not None:
                self._checked[name] = stamp
        else:
            advance(record.nbytes)
        return path

    def manifest_bytes(self) -> bytes:
        """manifest.json as it is in the folder. Raises ArtifactError when it is not what was opened."""
        data = (self.path / MANIFEST_NAME).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise ArtifactError("the manifest has changed", where=self.path / MANIFEST_NAME, hint="start again")
        return data

    def copy_file(self, name: str, target: Path, advance: Advance = unwatched) -> FileRecord:
        """Write the bytes of a listed file to a new one, after they were found as the manifest says on the way.

        A copy and no hard link: what is done to one of them later does not reach the other, and onnx refuses external
        data that has several links. Raises ArtifactError as `checked_path` does; `target` is half written then.
        """
        record = next(record for record in self.manifest.files if record.file == name)
        with target.open("xb") as copy:
            _check_file(self.path, self.path / name, record, advance, copy)
        return record

    def check_files(self, names: Iterable[str] | None = None, watch: Steps | None = None) -> None:
        """Check some files, or all of them; raises ArtifactError at the first that differs."""
        nbytes = {record.file: record.nbytes for record in self.manifest.files}
        chosen = list(nbytes if names is None else names)
        advance = (watch or Silent()).count(sum(nbytes[name] for name in chosen), BYTES)
        for name in chosen:
            self.checked_path(name, advance)

    def read_reference(self) -> tuple[Images, dict[str, Array]]:
        """Recorded `pixel_values` [N, ...] and the reference outputs by name, [N, ...] each."""
        manifest = self.manifest
        path, tensors = self._read_tensors(manifest.reference.file, "the reference")
        specs = (*manifest.inputs, *manifest.outputs)
        count = len(manifest.reference.seeds)
        for spec in specs:
            got = tensors.get(spec.name)
            if got is None or got.shape != spec.of_batch(count) or got.dtype != spec.dtype:
                raise ArtifactError(
                    f"the reference does not hold {spec.name} as the manifest says",
                    where=path,
                    expected=f"{spec.dtype} {list(spec.of_batch(count))}",
                    got="nothing" if got is None else f"{got.dtype} {list(got.shape)}",
                    hint="export the artifact again",
                )
        inputs = tensors[manifest.inputs[0].name]
        return inputs, {spec.name: tensors[spec.name] for spec in manifest.outputs}

    def read_probes(self, probes: Probes) -> dict[str, ProbeRecord]:
        """What the reference network gave at each boundary of this artifact's probes, by module."""
        path, tensors = self._read_tensors(probes.file, "the record of the probes")
        count = len(self.manifest.reference.seeds)
        records = {}
        for module in (boundary.module for boundary in probes.boundaries):
            sketch, norm = tensors.get(f"{module}.sketch"), tensors.get(f"{module}.norm")
            if sketch is None or norm is None or sketch.shape[:1] != (count,) or norm.shape != (count,):
                raise ArtifactError(
                    f"the record of the probes does not hold {module} as the manifest says",
                    where=path,
                    expected=f"{module}.sketch [{count}, K] and {module}.norm [{count}]",
                    got=", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())[:200],
                    hint="export the artifact again",
                )
            scale = tensors.get(f"{module}.scale", np.ones((), np.float32))
            records[module] = ProbeRecord(sketch.astype(np.float64), norm.astype(np.float64), scale)
        return records

    def _read_tensors(self, name: str, what: str) -> tuple[Path, dict[str, npt.NDArray[Any]]]:
        """Path and tensors of a safetensors file, after its hash was checked."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.checked_path(name)
        try:
            return path, load_file(path)
        except SafetensorError as error:
            raise ArtifactError(
                f"{what} is no safetensors file", where=path, got=error, hint="export the artifact again"
            ) from error


def open_artifact(path: str | os.PathLike[str], recorded: Iterable[RecordedFile] = ()) -> Artifact:
    """The artifact in a folder; reads the manifest only. Raises ArtifactError when it is none.

    Files that this process `recorded`, as the manifest says, are hashed again only when written since.
    """
    folder = Path(path)
    file = folder / MANIFEST_NAME
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            "there is no artifact here" if folder.exists() else "there is no such folder",
            where=folder,
            expected=f"a folder that holds {MANIFEST_NAME}",
            hint="pass the folder that npu-export printed",
        ) from None
    except OSError as error:
        raise ArtifactError("the manifest cannot be read", where=file, got=error) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(
            "the manifest is not UTF-8", where=file, got=error, hint="export the artifact again"
        ) from error
    manifest = decode_manifest(text, str(file))
    checked = {record.file: stamp for record, stamp in recorded if record in manifest.files and stamp is not None}
    return Artifact(folder, manifest, hashlib.sha256(data).hexdigest(), checked)


def sha256_file(path: Path, advance: Advance = unwatched, copy: BinaryIO | None = None) -> str:
    """sha256 of a file's bytes, in hexadecimal, which are written to `copy` too; memory stays bounded."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if copy is not None:
                copy.write(buffer[:count])
            advance(count)
    return digest.hexdigest()


def record_file(folder: Path, name: str, advance: Advance = unwatched) -> RecordedFile:
    """Size and sha256 of a file as it is on disk now."""
    path = folder / name
    stamp = _stamp(path)
    return RecordedFile(FileRecord(name, path.stat().st_size, sha256_file(path, advance)), stamp)


def _stamp(path: Path) -> Stamp | None:
    """None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check_file(folder: Path, path: Path, record: FileRecord, advance: Advance, copy: BinaryIO | None = None) -> None:
    hint = "copy the artifact again, or export it again"
    if not path.is_file():
        raise ArtifactError("the artifact lacks a file", where=path, expected=f"{record.nbytes} bytes", hint=hint)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            "a file of the artifact is a link to a place outside it",
            where=path,
            expected=f"a file inside {folder}",
            got=path.resolve(),
            hint=hint,
        )
    nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        raise ArtifactError(
            "a file of the artifact has another size",
            where=path,
            expected=f"{record.nbytes} bytes",
            got=f"{nbytes} bytes",
            hint=hint,
        )
    sha256 = sha256_file(path, advance, copy)
    if sha256 != record.sha256:
        raise ArtifactError(
            "a file of the artifact has changed",
            where=path,
            expected=f"sha256 {record.sha256}",
            got=f"sha256 {sha256}",
            hint=hint,
        )
