"""Put a whole folder under its final name, or nothing.

A folder is built beside its final place as `.NAME.partial-XXXXXXXX`, held by a lock for as long as its
process lives, and renamed when it is complete. What a killed process left is recognised by the name and
the free lock, and cleaned by the next run for the same NAME.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.errors import UsageError

PARTIAL = "partial"
REPLACED = "replaced"


def check_output(final: Path, *, force: bool) -> None:
    """Refuse an output that must not be replaced.

    Raises UsageError when `final` exists without `force`, and, with it, when it is no artifact.
    """
    if not os.path.lexists(final):
        return
    if not force:
        raise UsageError(
            "the output exists",
            where=final,
            expected="a folder that does not exist yet",
            hint="pass --output with another folder, or --force to replace this artifact",
        )
    replaceable = final.is_dir() and not final.is_symlink()
    if not replaceable or (any(final.iterdir()) and not (final / MANIFEST_NAME).is_file()):
        raise UsageError(
            "the output exists and is no artifact, so --force does not replace it",
            where=final,
            expected=f"an empty folder, or one with {MANIFEST_NAME}",
            hint="pass --output with another folder",
        )


@contextlib.contextmanager
def stage(final: Path, *, force: bool = False) -> Iterator[Path]:
    """A new folder that becomes `final` when the block ends, and is removed when it raises."""
    final = final.absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final.parent, wait=True):
        clean_leftovers(final)
        check_output(final, force=force)
        partial = _sibling(final, PARTIAL)
        partial.mkdir()
        lock = contextlib.ExitStack()
        lock.enter_context(_locked(partial, wait=False))
    try:
        with lock:
            yield partial
            _sync(partial)
            _put_in_place(partial, final, force)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def clean_leftovers(final: Path) -> None:
    """Remove what killed runs left beside `final`; put back an artifact that was being replaced."""
    for leftover in final.parent.glob(f".{final.name}.*-*"):
        kind = leftover.name[len(final.name) + 2 :].split("-")[0]
        if kind not in (PARTIAL, REPLACED):
            continue
        try:
            with _locked(leftover, wait=False) as held:
                if not held:
                    continue  # nobody can tell whether its process lives
                if kind == REPLACED and not final.exists():
                    leftover.rename(final)
                else:
                    shutil.rmtree(leftover)
        except BlockingIOError:
            continue  # a living process holds it


def _put_in_place(partial: Path, final: Path, force: bool) -> None:
    with _locked(final.parent, wait=True):
        check_output(final, force=force)
        replaced = None
        if final.exists():
            replaced = _sibling(final, REPLACED)
            final.rename(replaced)
        partial.rename(final)
        _sync_folder(final.parent)
        if replaced is not None:
            shutil.rmtree(replaced)


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
        _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
