"""The rows of a run while it lasts, in a folder beside the output, and a journal of what of them is whole.

`.NAME.partial/` holds the list of what was found, rows, names and bad images, each only appended to, and the journal,
which is replaced at most once a second, after what it speaks of is on the disk. What a killed run wrote beyond the
journal is cut off by the one that resumes. The output gets its name by a rename when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from npu_runtime.artifact.staging import DISK_FULL, sync_path
from npu_runtime.bulk.formats import PART_NBYTES, Rows, header, write_part
from npu_runtime.bulk.sources import to_line
from npu_runtime.errors import Error, UsageError

COMMIT_S = 1.0
"""How much work a killed run may lose, beside the batch that ran."""
JOURNAL, LIST, DATA, NAMES, BAD, PARTS = "journal.json", "list.jsonl", "data", "names.jsonl", "bad.jsonl", "parts"
_COPY_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Journal:
    """How far a run is, in whole batches."""

    identity: Mapping[str, str | int]
    """What a run must share with the one that it resumes: artifact, list, output, and where it runs."""
    done: int = 0
    """Of the list's lines."""
    rows: int = 0
    bad: int = 0
    parts: int = 0
    """Parquet parts that are whole; their rows are no longer in the data."""
    sizes: Mapping[str, int] | None = None
    """Bytes of the data, the names and the list of bad images; None before the first."""


class Partial:
    """The folder of one output's run, held by a lock; made by `open_partial`."""

    def __init__(self, output: Path, folder: Path) -> None:
        self.output = output
        self.folder = folder
        self.list = folder / LIST
        self._files: dict[str, int] = {}
        self._committed_s = 0.0

    @property
    def interrupted(self) -> bool:
        """Whether there are rows that a run can go on with."""
        return (self.folder / JOURNAL).exists()

    def clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def begin(self, rows: Rows, identity: Mapping[str, str | int]) -> Journal:
        """Open the files where the last run's journal says that they end, or anew. Raises UsageError where that run
        was another, and Error where files are shorter than the journal says."""
        self.rows = rows
        self.journal = Journal(identity)
        if self.interrupted:
            self.journal = self._read_journal(identity)
        for name in (DATA, NAMES, BAD):
            self._files[name] = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        (self.folder / PARTS).mkdir(exist_ok=True)
        with self.explained():
            if self.journal.sizes is None:
                start = header(self.output.suffix, rows, 0, 0)
                self._truncate(dict.fromkeys(self._files, 0))
                self._append(DATA, start)
                self.journal = replace(self.journal, sizes={DATA: len(start), NAMES: 0, BAD: 0})
            else:
                for name, descriptor in self._files.items():
                    if (nbytes := os.fstat(descriptor).st_size) < self.journal.sizes[name]:
                        raise Error(
                            "a file of the interrupted run was cut short",
                            where=self.folder / name,
                            expected=f"at least {self.journal.sizes[name]:,} bytes",
                            got=f"{nbytes:,} bytes",
                            hint="run it with --force in place of --resume, which begins anew",
                        )
                self._truncate(self.journal.sizes)
                if self._is_parquet and self._sizes[DATA] >= PART_NBYTES:
                    self._cut_part()
        return self.journal

    def append(self, rows: bytes | memoryview, names: Sequence[str], bad: Sequence[tuple[str, str]]) -> None:
        """A batch: its rows, their names, and the names of its bad images with the reasons. All of it, or none."""
        journal = self.journal
        try:
            with self.explained():
                self._append(DATA, rows)
                self._append(NAMES, b"".join(map(to_line, names)))
                self._append(BAD, b"".join(to_line({"name": name, "reason": reason}) for name, reason in bad))
                self.journal = Journal(
                    journal.identity,
                    journal.done + len(names) + len(bad),
                    journal.rows + len(names),
                    journal.bad + len(bad),
                    journal.parts,
                    {name: os.fstat(descriptor).st_size for name, descriptor in self._files.items()},
                )
                if self._is_parquet and self._sizes[DATA] >= PART_NBYTES:
                    self._cut_part()
                elif time.monotonic() - self._committed_s >= COMMIT_S:
                    self.commit()
        except BaseException:
            if self.journal is journal:
                self._truncate(self._sizes)
            raise

    def commit(self) -> None:
        """Bring what was appended to the disk, and then the journal that says so."""
        for descriptor in self._files.values():
            os.fsync(descriptor)
        new = self.folder / f"{JOURNAL}.new"
        try:
            with new.open("wb") as file:
                file.write(json.dumps(asdict(self.journal)).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.folder / JOURNAL)
            sync_path(self.folder)
        finally:
            new.unlink(missing_ok=True)
        self._committed_s = time.monotonic()

    def finish(self) -> None:
        """Make the output whole and give it its name, beside it the lists of names and of bad images.

        There is no output of no rows.
        """
        with self.explained():
            self._complete()
            self.commit()
        self._close()
        # The output comes last: where it is, all is.
        if self.journal.bad:
            (self.folder / BAD).replace(side_file(self.output, BAD))
        else:
            side_file(self.output, BAD).unlink(missing_ok=True)  # an older run's
        if self.journal.rows and self.output.suffix == ".npy":
            (self.folder / NAMES).replace(side_file(self.output, NAMES))
        if self.journal.rows and self._is_parquet:
            _replace_folder(self.folder / PARTS, self.output)
        elif self.journal.rows:
            (self.folder / DATA).replace(self.output)
        sync_path(self.output.parent)
        self.clear()

    def _complete(self) -> None:
        if self._is_parquet:
            if self._sizes[DATA]:
                self._cut_part()
            return
        names_nbytes = self._append_names() if self.output.suffix == ".safetensors" else 0
        os.pwrite(self._files[DATA], header(self.output.suffix, self.rows, self.journal.rows, names_nbytes), 0)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise Error that says so where the disk takes no more bytes; other errors pass."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            again = "then go on with --resume" if self.interrupted else "or pass --output on another disk"
            raise Error(
                "the disk takes no more bytes",
                where=self.output,
                got=error,
                hint=f"free some room or raise the quota, {again}",
            ) from error

    def end(self) -> None:
        """Close the files; keep the whole batches where the run did not come to its end."""
        if self._files:
            with contextlib.suppress(OSError):  # a full disk: the journal there is speaks of less
                if self.journal.done:
                    self.commit()
            self._close()

    @property
    def _sizes(self) -> Mapping[str, int]:
        assert self.journal.sizes is not None
        return self.journal.sizes

    @property
    def _is_parquet(self) -> bool:
        return self.output.suffix == ".parquet"

    def _read_journal(self, identity: Mapping[str, str | int]) -> Journal:
        journal = Journal(**json.loads((self.folder / JOURNAL).read_bytes()))
        differing = [name for name in identity if journal.identity.get(name) != identity[name]]
        if differing:
            raise UsageError(
                "the interrupted run was another",
                where=self.folder,
                expected=", ".join(f"{name} {journal.identity.get(name)}" for name in differing),
                got=", ".join(f"{name} {identity[name]}" for name in differing),
                hint="run it as it was, or with --force in place of --resume, which begins anew",
            )
        for name in (NAMES, BAD):  # a run that was killed while it gave files their names
            moved = side_file(self.output, name)
            if not (self.folder / name).exists() and moved.exists():
                moved.replace(self.folder / name)
        return journal

    def _cut_part(self) -> None:
        """Make a Parquet part of the data, and journal it before the data is cut off."""
        descriptor = self._files[DATA]
        names = [json.loads(line) for line in (self.folder / NAMES).read_bytes().splitlines()]
        name = f"part-{str(self.journal.identity['list_sha256'])[:8]}-{self.journal.parts:05}.parquet"
        new = self.folder / f"{name}.new"
        write_part(new, self.rows, os.pread(descriptor, self._sizes[DATA], 0), names)
        sync_path(new)
        new.replace(self.folder / PARTS / name)
        sync_path(self.folder / PARTS)
        self.journal = replace(self.journal, parts=self.journal.parts + 1, sizes={**self._sizes, DATA: 0, NAMES: 0})
        self.commit()
        self._truncate(self._sizes)

    def _append_names(self) -> int:
        """The names behind the rows; the journal stays as it is, so that a run that resumes cuts them off again."""
        with (self.folder / NAMES).open("rb") as file:
            while block := file.read(_COPY_NBYTES):
                self._append(DATA, block)
        return self._sizes[NAMES]

    def _append(self, name: str, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._files[name], left) :]

    def _truncate(self, sizes: Mapping[str, int]) -> None:
        for name, descriptor in self._files.items():
            os.ftruncate(descriptor, sizes[name])
            os.lseek(descriptor, 0, os.SEEK_END)

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


@contextlib.contextmanager
def open_partial(output: Path, *, resume: bool, force: bool) -> Iterator[Partial]:
    """The folder of a run, empty or with what an interrupted run left for `resume`; removed when nothing is in it.

    Raises UsageError where another process has it, and where there are rows which neither option disposes of.
    """
    folder = _folder(output)
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another run writes this output", where=output, hint="wait for its end") from None
        partial = Partial(output, folder)
        if partial.interrupted and not (resume or force):
            raise UsageError(
                "an interrupted run left rows of this output",
                where=folder,
                hint="pass --resume to go on with it, or --force to begin anew",
            )
        if not (partial.interrupted and resume):
            partial.clear()
        try:
            yield partial
        finally:
            partial.end()
            if not partial.interrupted:
                shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def side_file(output: Path, name: str) -> Path:
    """Where a list beside the output lies: `NAME.npy.names.jsonl`."""
    return output.with_name(f"{output.name}.{name}")


def check_replaceable(output: Path) -> None:
    """Raise UsageError where an output that exists is no file of features, or folder of Parquet parts."""
    if not os.path.lexists(output):
        return
    parquet = output.suffix == ".parquet"
    if parquet and output.is_dir() and not output.is_symlink():
        foreign = sorted(entry.name for entry in output.iterdir() if entry.suffix != ".parquet")
    else:
        foreign = [output.name] if parquet or output.is_dir() else []
    if foreign:
        raise UsageError(
            "the output exists and is no such file, so --force does not replace it",
            where=output,
            expected="a folder of Parquet parts" if parquet else "a file",
            got=", ".join(foreign[:5]),
            hint="pass --output with another name",
        )


def _replace_folder(new: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    new.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def clean_finished(output: Path) -> None:
    """Remove what a run left that was killed after it had given the output its name."""
    folder = _folder(output)
    kept = folder / (PARTS if output.suffix == ".parquet" else DATA)
    if output.exists() and (folder / JOURNAL).exists() and not kept.exists():
        shutil.rmtree(folder)


def _folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")
