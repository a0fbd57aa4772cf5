"""The records of a report, told apart and put together by the artifact that they are of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npu_runtime.artifact.codec import decode_manifest
from npu_runtime.artifact.schema import MANIFEST_NAME, Manifest, Precision, Weights
from npu_runtime.artifact.store import sha256_file
from npu_runtime.bench.records import BenchRecord
from npu_runtime.bench.records import decode_record as decode_bench
from npu_runtime.errors import Error
from npu_runtime.parity.record_files import decode_record as decode_parity
from npu_runtime.parity.records import ParityRecord

HINT = "pass what npu-runtime parity, verify or bench wrote with --record, and artifacts or their manifest.json"


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
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Error("the record is no text", where=file, got=error, hint=HINT) from error
    document = _parse(text, file)
    kind = document.get("record")
    if kind == "parity":
        return decode_parity(text, str(file))
    if kind == "bench":
        return decode_bench(text, str(file))
    if kind is None and {"schema", "encoder", "programs"} <= document.keys():
        return decode_manifest(text, str(file))
    raise Error(
        "this is no record that a report is made of",
        where=file,
        expected='"record": "parity" or "bench", or an artifact\'s manifest.json',
        got=f'"record": {json.dumps(kind)}' if "record" in document else ", ".join(document)[:80] or "nothing",
        hint=HINT,
    )


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Error("the record is not JSON", where=file, got=error, hint=HINT) from error
    if not isinstance(document, dict):
        raise Error("this is no record", where=file, expected="a JSON object", got=text[:40], hint=HINT)
    return document
