"""Embed what was found, batch by batch, to a partial output."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from npu_runtime.bulk.partial import Partial
from npu_runtime.bulk.sources import Found, Reader
from npu_runtime.encoder import Encoder
from npu_runtime.errors import BadImage
from npu_runtime.steps import Advance, unwatched
from npu_runtime.stream import Source


@dataclass(frozen=True, slots=True)
class Listed:
    """The list of what was found, which lies in the partial output."""

    found: int
    sha256: str
    tars: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What came of what was found: each is embedded or bad."""

    found: int
    embedded: int
    bad: int
    resumed: int
    """Of the embedded and the bad, those of runs that were interrupted."""


def write_list(partial: Partial, found: Iterable[Found]) -> Listed:
    """Write the list of what was found."""
    new = partial.list.with_name(f"{partial.list.name}.new")
    digest, count, tars, last = hashlib.sha256(), 0, 0, None
    with partial.explained(), new.open("wb") as file:
        for image in found:
            line = image.to_line()
            digest.update(line)
            file.write(line)
            count += 1
            tars += image.tar is not None and image.tar != last
            last = image.tar
    new.replace(partial.list)
    return Listed(count, digest.hexdigest(), tars)


def embed_list(
    encoder: Encoder,
    partial: Partial,
    *,
    workers: int | None = None,
    strict: bool = False,
    advance: Advance = unwatched,
) -> Counts:
    """Embed what the list has from where the journal says on, and finish the output when all is done.

    There is no output where no image was good. Raises InputError for the first bad image where `strict`; the batches
    before it are kept in the partial output.
    """
    before = partial.journal
    names: deque[str] = deque()
    with partial.list.open("rb") as lines, contextlib.closing(Reader()) as reader:

        def images() -> Iterator[Source]:
            for line in itertools.islice(lines, before.done, None):
                found = Found.from_line(line)
                names.append(found.name)
                yield reader.read(found)

        with encoder.stream(images(), output=partial.rows.name, workers=workers, on_bad="give") as stream:
            for rows in stream.batches():
                good, bad = [], []
                for row in rows:
                    name = names.popleft()
                    if not isinstance(row, BadImage):
                        good.append((name, row))
                    elif strict:
                        raise row.error
                    else:
                        bad.append((name, row.reason))
                data = np.stack([row for _, row in good]).tobytes() if good else b""
                partial.append(data, [name for name, _ in good], bad)
                advance(len(rows))
    journal = partial.journal
    partial.finish()
    return Counts(journal.done, journal.rows, journal.bad, before.done)
