"""Which images there are: files, folders, globs, lists and tars, one after the other in an order that stays.

They are listed once, to a file, before the first is read, so that a run knows how many there are and one that resumes
has the same. Members of a tar, such as a WebDataset shard, are listed by where their bytes lie, and read in that order
without being extracted.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from npu_runtime.decode import image_suffixes
from npu_runtime.errors import InputError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MOST_MEMBER_NBYTES = 1 << 30
"""Of an image in a tar, which is read into memory whole."""


@dataclass(frozen=True, slots=True)
class Found:
    """An image that was found, or what could not be looked into for some."""

    name: str
    """Its path, of a tar's member `TAR/MEMBER`; bytes that are no UTF-8 are surrogates, as in `os.fsdecode`."""
    tar: str | None = None
    """The tar that it lies in; None where it is a file."""
    offset: int = 0
    """Where its bytes begin in the tar, which is counted after decompression."""
    nbytes: int = 0
    """How many there are, in a tar."""
    problem: str | None = None
    """Why there is no image to be had; None where it may be read."""

    def to_line(self) -> bytes:
        values = (self.name, self.tar, self.offset, self.nbytes, self.problem)
        last = max(index for index, value in enumerate(values) if value)
        return to_line(values[: last + 1])

    @staticmethod
    def from_line(line: bytes) -> Found:
        return Found(*json.loads(line))


def to_line(value: object) -> bytes:
    """A line of JSON in ASCII, in which any name is one line and comes back as it was: `\\n`, `\\udcff`."""
    return json.dumps(value).encode("ascii") + b"\n"


def find_images(arguments: Iterable[str], listed: BinaryIO | None = None, *, end: bytes = b"\n") -> Iterator[Found]:
    """The images of each argument in turn; `-` stands for the names in `listed`, which `end` ends.

    A file named is one whatever its name ends in, and so is what a glob matches; in folders, which are searched in
    the order of their names, and in tars, files count whose names end as images do. Of a folder that is found again,
    through a symbolic link, nothing is found the second time.
    """
    finder = _Finder()
    for argument in arguments:
        if argument != "-":
            for path in expand(argument):
                yield from finder.find(path)
            continue
        for name in _split(listed, end) if listed is not None else ():
            yield from finder.find(os.fsdecode(name))


def expand(argument: str) -> list[str]:
    """The paths that a glob matches, sorted by their bytes; the argument itself where it exists or is no glob."""
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    return sorted(glob.glob(argument, recursive=True), key=os.fsencode)


class Reader:
    """Reads what was found; keeps the tar open that it read of last, and goes through it forward."""

    def __init__(self) -> None:
        self._tar: str | None = None
        self._archive: Any = None

    def read(self, found: Found) -> str | bytes | InputError:
        """The path of a file, the bytes of a tar's member, or why neither is to be had."""
        if found.problem is not None:
            return InputError(found.problem, where=found.name)
        if found.tar is None:
            return found.name
        if found.nbytes > MOST_MEMBER_NBYTES:
            most = f"at most {MOST_MEMBER_NBYTES:,} bytes"
            return InputError("the image is too large", where=found.name, expected=most, got=f"{found.nbytes:,} bytes")
        try:
            if found.tar != self._tar:
                self.close()
                self._archive = tarfile.open(found.tar)  # noqa: SIM115
                self._tar = found.tar
            self._archive.fileobj.seek(found.offset)
            data: bytes = self._archive.fileobj.read(found.nbytes)
        except _UNREADABLE as error:
            return InputError("the tar cannot be read", where=found.name, got=error)
        if len(data) < found.nbytes:
            got = f"{len(data):,} of {found.nbytes:,} bytes"
            return InputError("the tar ends inside of this image", where=found.name, got=got)
        return data

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
        self._tar = self._archive = None


class _Finder:
    def __init__(self) -> None:
        self._suffixes = image_suffixes()
        self._seen: set[tuple[int, int]] = set()

    def find(self, path: str) -> Iterator[Found]:
        """What is at a path that was named."""
        try:
            kind = os.stat(path)
        except (OSError, ValueError) as error:  # ValueError: a null character
            yield Found(path, problem=_reason(error))
            return
        if stat.S_ISDIR(kind.st_mode):
            yield from self._walk(path)
        elif not stat.S_ISREG(kind.st_mode):
            yield Found(path, problem="this is neither a file nor a folder")
        elif path.lower().endswith(TAR_SUFFIXES):
            yield from self._members(path)
        else:
            yield Found(path)

    def _walk(self, folder: str) -> Iterator[Found]:
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                names = sorted((entry.name for entry in entries), key=os.fsencode)
        except OSError as error:
            yield Found(folder, problem=_reason(error))
            return
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                yield from self._walk(path)
            elif name.lower().endswith(TAR_SUFFIXES) or self._is_image(name):
                yield from self.find(path)

    def _members(self, path: str) -> Iterator[Found]:
        try:
            with tarfile.open(path) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                    if member.isreg() and self._is_image(member.name):
                        name = f"{path}/{member.name}"
                        problem = "a sparse member of a tar is not read" if member.issparse() else None
                        yield Found(name, path, member.offset_data, member.size, problem)
        except _UNREADABLE as error:
            yield Found(path, problem=f"the tar cannot be read: {_reason(error)}")

    def _is_image(self, name: str) -> bool:
        return os.path.splitext(name)[1].lower() in self._suffixes


def _errors_of_tars() -> Iterator[type[Exception]]:
    """What damaged tars raise; gzip and xz their own, where this Python was built with them."""
    yield from (OSError, EOFError, tarfile.TarError)
    with contextlib.suppress(ImportError):
        import zlib

        yield zlib.error
    with contextlib.suppress(ImportError):
        import lzma

        yield lzma.LZMAError


_UNREADABLE: tuple[type[Exception], ...] = tuple(_errors_of_tars())


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _split(listed: BinaryIO, end: bytes) -> Iterator[bytes]:
    """The parts of a stream, without empty ones; a few at a time in memory."""
    rest = b""
    read: Callable[[int], bytes] = getattr(listed, "read1", listed.read)
    while data := read(1 << 16):
        *whole, rest = (rest + data).split(end)
        yield from filter(None, whole)
    if rest:
        yield rest
