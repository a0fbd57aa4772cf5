"""Put a whole folder under its final name, or nothing.

A folder is built beside its final place as `.NAME.partial-XXXXXXXX`, held by a lock for as long as its
process lives, and renamed when it is complete. What a killed process left is recognised by the name and
the free lock, and cleaned by the next run for the same NAME.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.errors import Error, UsageError
from npu_runtime.steps import Silent, Steps

PARTIAL = "partial"
REPLACED = "replaced"

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room, no quota, or a file larger than this process may write."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a folder is; one is replaced only by its own kind."""

    name: str
    index: str
    """A file of JSON that lists all others under `files`, each with its path as `file`."""
    keys: frozenset[str]
    """What the index has beside."""


ARTIFACT = Kind("an artifact", MANIFEST_NAME, frozenset({"schema", "encoder", "programs"}))


def check_output(final: Path, *, force: bool, kind: Kind = ARTIFACT) -> None:
    """Refuse an output that must not be replaced.

    Raises UsageError when `final` exists without `force`, and, with it, when it is none of its kind.
    """
    if not os.path.lexists(final):
        return
    if not force:
        raise UsageError(
            "the output exists",
            where=final,
            expected="a folder that does not exist yet",
            hint=f"pass --output with another folder, or --force to replace {kind.name}",
        )
    replaceable = final.is_dir() and not final.is_symlink()
    foreign = _foreign_files(final, kind) if replaceable else [final.name]
    if foreign:
        raise UsageError(
            f"the output exists and is not just {kind.name}, so --force does not replace it",
            where=final,
            expected=f"an empty folder, or {kind.index} and the files that it lists",
            got=", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else ""),
            hint="pass --output with another folder",
        )


@contextlib.contextmanager
def stage(final: Path, *, force: bool = False, watch: Steps | None = None, kind: Kind = ARTIFACT) -> Iterator[Path]:
    """A new folder that becomes `final` when the block ends, and is removed when it raises.

    `watch` is told when its files are brought to the disk. Raises Error where the folder cannot be made and where
    the disk takes no more bytes.
    """
    final = final.absolute()
    lock = contextlib.ExitStack()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.parent, wait=True):
            clean_leftovers(final)
            check_output(final, force=force, kind=kind)
            partial = _sibling(final, PARTIAL)
            partial.mkdir()
            lock.enter_context(_locked(partial, wait=False))
    except OSError as error:
        raise Error(
            "the output cannot be written", where=final, got=error, hint="pass --output with another folder"
        ) from error
    with lock:
        try:
            with explain_full_disk(final):
                yield partial
                with (watch or Silent()).step("bring the files to the disk"):
                    _sync(partial)
                    _put_in_place(partial, final, force, kind)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Raise Error that says so where the disk takes no more bytes of `output`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise Error(
            "the disk takes no more bytes",
            where=output,
            got=error,
            hint="free some room or raise the quota, or pass --output on another disk",
        ) from error


def require_room(path: Path, nbytes: int) -> None:
    """Raise OSError where the system does not grant a file of this size; leave an empty one.

    For writers that do not raise on a full disk, such as torch's.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        file.truncate(0)


def write_file(path: Path, data: bytes) -> None:
    """Write one file, whole or not at all; raises Error that says so where the disk takes no more bytes."""
    partial = path.with_name(f".{path.name}.{PARTIAL}-{secrets.token_hex(4)}")
    try:
        with explain_full_disk(path):
            partial.write_bytes(data)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_new_file(path: Path, *, force: bool) -> None:
    """Raise UsageError where a file could not be written later: it exists without `force`, or has no folder."""
    if path.exists() and not force:
        raise UsageError("the output exists", where=path, hint="pass another name, or --force")
    if not path.parent.is_dir():
        raise UsageError("the folder of the output does not exist", where=path.parent, hint="make it first")


def clean_leftovers(final: Path) -> None:
    """Remove what killed runs left beside `final`; put back an artifact that was being replaced."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.({PARTIAL}|{REPLACED})-[0-9a-f]{{8}}")
    for leftover in sorted(final.parent.iterdir()):
        match = pattern.fullmatch(leftover.name)
        if match is None or leftover.is_symlink() or not leftover.is_dir():
            continue
        try:
            with _locked(leftover, wait=False) as held:
                if not held:
                    continue  # nobody can tell whether its process lives
                if match[1] == REPLACED and not final.exists():
                    leftover.rename(final)
                else:
                    shutil.rmtree(leftover)
        except (BlockingIOError, FileNotFoundError):
            continue  # a living process holds it, or has just removed it


def _put_in_place(partial: Path, final: Path, force: bool, kind: Kind) -> None:
    with _locked(final.parent, wait=True):
        check_output(final, force=force, kind=kind)
        replaced = _sibling(final, REPLACED) if final.exists() else None
        try:
            if replaced is not None:
                final.rename(replaced)
            partial.rename(final)
        except BaseException:  # Ctrl-C between the renames among them
            if replaced is not None and replaced.exists() and not final.exists():
                replaced.rename(final)
            raise
        sync_path(final.parent)
        if replaced is not None:
            shutil.rmtree(replaced)


def _foreign_files(folder: Path, kind: Kind) -> list[str]:
    """Files in a folder that are not those of its kind, of whatever version; all where it is none.

    Web pages and browser extensions have a manifest.json too.
    """
    present = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    try:
        document = json.loads((folder / kind.index).read_bytes())
        listed = {kind.index, *(record["file"] for record in document["files"])}
        if not document.keys() >= kind.keys:
            return present
    except (OSError, ValueError, KeyError, TypeError):
        return present
    return [name for name in present if name not in listed]


def _sibling(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the advisory lock of a folder; the kernel frees it when the process dies.

    Gives False where the file system has no locks for folders (NFS answers EBADF). Raises
    BlockingIOError when another process holds the lock and `wait` is false.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            held = False
        yield held
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Files reach the disk before the rename does, so that a power cut leaves no hollow artifact."""
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """A file's bytes, or what has been renamed in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
