"""The records of a report, told apart and put together by the artifact that they are of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from npu_runtime.artifact.codec import decode_manifest
from npu_runtime.artifact.schema import MANIFEST_NAME, Manifest, Precision, Weights
from npu_runtime.artifact.store import sha256_file
from npu_runtime.bench.record_files import decode_record as decode_bench
from npu_runtime.bench.records import BenchRecord
from npu_runtime.errors import Error
from npu_runtime.parity.record_files import decode_record as decode_parity
from npu_runtime.parity.records import ParityRecord
from npu_runtime.structured import read_record_name, read_record_text

DECODERS: Mapping[str, Callable[[str, str], ParityRecord | BenchRecord]] = {
    "parity": decode_parity,
    "bench": decode_bench,
}
"""What a record says that it is -> how it is read."""


@dataclass(frozen=True, slots=True)
class Given:
    """A record and the file that it came from."""

    path: str
    record: ParityRecord | BenchRecord


@dataclass(slots=True)
class Subject:
    """One artifact, and everything that was given about it, in the order in which it was given."""

    digest: str
    """sha256 of its manifest.json."""
    manifest: Manifest | None = None
    """None where it was not given: then nothing is known but what the records repeat."""
    manifest_path: str | None = None
    records: list[Given] = field(default_factory=list)

    @property
    def parities(self) -> list[ParityRecord]:
        return [given.record for given in self.records if isinstance(given.record, ParityRecord)]

    @property
    def benches(self) -> list[BenchRecord]:
        return [given.record for given in self.records if isinstance(given.record, BenchRecord)]

    @property
    def encoder(self) -> str:
        return self._identity[0]

    @property
    def precision(self) -> Precision:
        return self._identity[1]

    @property
    def weights(self) -> Weights:
        return self._identity[2]

    @property
    def path(self) -> str:
        """The artifact's folder as a record names it, or as it was given."""
        if self.manifest_path is not None:
            return str(Path(self.manifest_path).parent)
        record = self.records[0].record
        return record.artifact.path if isinstance(record, ParityRecord) else record.artifact

    @property
    def _identity(self) -> tuple[str, Precision, Weights]:
        if self.manifest is not None:
            return self.manifest.encoder, self.manifest.precision, self.manifest.provenance.weights
        record = self.records[0].record
        source = record.artifact if isinstance(record, ParityRecord) else record
        return source.encoder, source.precision, source.weights


def read_subjects(paths: Sequence[Path]) -> list[Subject]:
    """The artifacts that the files are of, in the order in which they are first named.

    A file is a record of parity, verify or bench, an artifact's manifest.json, or the artifact's folder.
    Raises Error that names the file where it is none of these, damaged, given twice, or of a newer major
    schema.
    """
    subjects: dict[str, Subject] = {}
    seen: dict[str, Path] = {}
    for path in paths:
        file = path / MANIFEST_NAME if path.is_dir() else path
        digest = sha256_file(file)
        if digest in seen:
            raise Error("this record was given twice", where=path, got=f"the same bytes as {seen[digest]}")
        seen[digest] = path
        found = _read(file)
        if isinstance(found, Manifest):
            subject = subjects.setdefault(digest, Subject(digest))
            subject.manifest, subject.manifest_path = found, str(file)
            continue
        of = found.artifact.digest if isinstance(found, ParityRecord) else found.digest
        subjects.setdefault(of, Subject(of)).records.append(Given(str(path), found))
    return list(subjects.values())


def _read(file: Path) -> Manifest | ParityRecord | BenchRecord:
    text, where = read_record_text(file), str(file)
    name = read_record_name(text, where)
    if name is not None and name in DECODERS:
        return DECODERS[name](text, where)
    document = json.loads(text)
    if isinstance(document, dict) and {"schema", "encoder", "programs"} <= document.keys() and name is None:
        return decode_manifest(text, where)
    raise Error(
        "this is no record that a report is made of",
        where=where,
        expected=f'"record": {" or ".join(DECODERS)}, or an artifact\'s {MANIFEST_NAME}',
        got=f'"record": "{name}"' if name is not None else text[:80],
        hint="pass what npu-runtime parity, verify or bench wrote with --record or --json, and artifacts",
    )
