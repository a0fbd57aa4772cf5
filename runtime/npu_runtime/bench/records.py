"""What a benchmark measured, with every sample, as data that another machine can read.

Versions of the schema:
    1.0  first.
    1.1  stages of rows on accelerators, throughput under load, and records of runs that were interrupted.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from npu_runtime.artifact.schema import Precision, Weights
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import GraphChoice, SessionReport, StageTimes
from npu_runtime.backends.table import EAGER, FORMATS
from npu_runtime.bench.cold import ColdStart
from npu_runtime.bench.statistics import Comparison, Latency, compare_paired, summarise_latency
from npu_runtime.devices import parse_device
from npu_runtime.devices.numerics import Numerics
from npu_runtime.environment import AcceleratorRecord
from npu_runtime.errors import Error
from npu_runtime.structured import Reader, read_header, to_json

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 1

BESIDE = ("record", "schema", "against")
"""Fields of the document that are no figures of the run."""
CSV_COLUMNS = ("backend", "batch", "round", "latency_ms")


@dataclass(frozen=True, slots=True)
class Stages:
    """Medians over rounds of their own, on the device's clock, on which waiting for the host counts as well."""

    transfer_in_ms: float
    compute_ms: float
    transfer_out_ms: float
    samples: tuple[StageTimes, ...] = ()
    """By round."""


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One backend at one batch size."""

    backend: str
    batch: int
    latency: Latency
    over_eager: Comparison | None
    """Paired by rounds; None for eager itself and where it was not run."""
    samples_ms: tuple[float, ...]
    """By round, which is the same of every backend at this batch size."""
    stages: Stages | None = None
    """None on the CPU, and of backends that cannot tell."""


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One backend at one batch size under the load of a number of callers, each with one call in flight."""

    backend: str
    batch: int
    callers: int
    seconds: float
    """What was measured, warm-up apart."""
    calls: int
    """That ended in it."""
    images_per_second: float
    """Batch size times calls over seconds."""
    latency: Latency
    """Of these calls; a call's own images a second are `latency.images_per_second`."""
    samples_ms: tuple[float, ...]
    """In the order in which the calls ended."""


@dataclass(frozen=True, slots=True)
class BenchRecord:
    """A run of `bench`."""

    artifact: str
    """Path of the folder."""
    digest: str
    """sha256 of its manifest.json, which holds the hash of every other file."""
    encoder: str
    precision: Precision
    weights: Weights
    summary: str
    """One line: whose weights these are."""
    environment: Mapping[str, object]
    """As describe_environment gives it before the first program is opened."""
    device: str
    accelerator: AcceleratorRecord | None
    """None on the CPU."""
    conditions: Mapping[str, SessionReport]
    """By backend."""
    threads: int
    numerics: Numerics
    graph: GraphChoice
    allow_fallback: bool
    warmup: int
    """Rounds that were run first and not kept."""
    iterations: int
    """Rounds that were asked for."""
    adaptive: bool
    """Whether a batch size ended before them where its intervals were narrow."""
    rows: tuple[BenchRow, ...]
    not_run: Mapping[str, str]
    """Backend -> why it could not be measured."""
    file_nbytes: Mapping[str, int]
    """Backend -> bytes of the artifact's files that it opens for these batch sizes; eager opens none of them."""
    cold: tuple[ColdStart, ...]
    """Empty where that was not asked for."""
    cold_not_run: Mapping[str, str]
    """Backend -> why it did not start in a fresh process."""
    seconds: float
    throughput: tuple[LoadRow, ...] = ()
    """Empty where that was not asked for."""
    load_seconds: float | None = None
    """What each of `throughput` was to be measured for; None where that was not asked for."""
    partial: bool = False
    """Whether the run was interrupted: what was measured until then stands, whole rounds and whole loads only."""

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys([row.batch for row in self.rows] + [row.batch for row in self.throughput]))


def make_record(
    artifact: Artifact,
    samples: Mapping[tuple[str, int], Sequence[float]],
    *,
    environment: Mapping[str, object],
    device: str,
    accelerator: AcceleratorRecord | None,
    conditions: Mapping[str, SessionReport],
    threads: int,
    numerics: Numerics,
    graph: GraphChoice,
    allow_fallback: bool,
    warmup: int,
    iterations: int,
    adaptive: bool,
    not_run: Mapping[str, str],
    seconds: float,
    cold: Sequence[ColdStart] = (),
    cold_not_run: Mapping[str, str] = MappingProxyType({}),
) -> BenchRecord:
    """The record of `samples`, milliseconds by backend and batch size, that were measured here and now."""
    manifest = artifact.manifest
    return BenchRecord(
        artifact=str(artifact.path),
        digest=artifact.digest,
        encoder=manifest.encoder,
        precision=manifest.precision,
        weights=manifest.provenance.weights,
        summary=manifest.weights_summary(),
        environment=environment,
        device=str(parse_device(device)),
        accelerator=accelerator,
        conditions=conditions,
        threads=threads,
        numerics=numerics,
        graph=graph,
        allow_fallback=allow_fallback,
        warmup=warmup,
        iterations=iterations,
        adaptive=adaptive,
        rows=tuple(
            BenchRow(
                backend,
                batch,
                summarise_latency(values, batch),
                compare_paired(samples[EAGER, batch], values)
                if backend != EAGER and (EAGER, batch) in samples
                else None,
                tuple(values),
            )
            for (backend, batch), values in samples.items()
        ),
        not_run=not_run,
        file_nbytes=_file_nbytes(artifact, samples),
        cold=tuple(cold),
        cold_not_run=dict(cold_not_run),
        seconds=seconds,
    )


def _file_nbytes(artifact: Artifact, keys: Iterable[tuple[str, int]]) -> dict[str, int]:
    sizes = {record.file: record.nbytes for record in artifact.manifest.files}
    opened: dict[str, set[str]] = {}
    for backend, batch in keys:
        for program in artifact.manifest.programs:
            if FORMATS.get(program.format) == backend and program.batch == batch:
                opened.setdefault(backend, set()).update((program.file, *program.needs))
    return {backend: sum(sizes[file] for file in files) for backend, files in opened.items()}


def encode_record(record: BenchRecord, against: object = None) -> str:
    """The record as indented JSON, and beside it how it compares with another."""
    beside = {} if against is None else {"against": to_json(against)}
    document = {"record": "bench", "schema": f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}", **to_json(record), **beside}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def encode_csv(record: BenchRecord) -> str:
    """The samples, one a line under CSV_COLUMNS, each number with all of its digits; rounds count from 0."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in record.rows:
        writer.writerows((row.backend, row.batch, index, value) for index, value in enumerate(row.samples_ms))
    return text.getvalue()


def read_record(path: str | Path) -> BenchRecord:
    """The record in a file, wherever it was made.

    Raises Error when it is none, of a newer major schema, or damaged: a wrong field, or figures that are not
    those of its samples.
    """
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Error("the record is no text", where=path, got=error) from error
    return decode_record(text, str(path))


def decode_record(text: str, where: str) -> BenchRecord:
    """The record in `text`, read from `where`; see `read_record`."""
    hint = "pass what npu-runtime bench wrote; upgrade npu-export to read a newer one"
    document, minor = read_header(text, where, record="bench", major=SCHEMA_MAJOR, hint=hint)
    body = {name: value for name, value in document.items() if name not in BESIDE}
    hint = "the file was edited or damaged; run it again"
    reader = Reader("the record", where, hint, Error, allow_not_finite=True)
    record = reader.decode(BenchRecord, body, lenient=minor > SCHEMA_MINOR)
    seen: set[tuple[str, int]] = set()
    for index, row in enumerate(record.rows):
        amiss = _amiss(row)
        if (row.backend, row.batch) in seen:
            amiss = f"a second row of {row.backend} batch {row.batch}"
        if amiss is not None:
            raise Error(
                f"the record has wrong figures at rows[{index}]",
                where=where,
                expected="positive latencies, and statistics that are theirs",
                got=amiss,
                hint=hint,
            )
        seen.add((row.backend, row.batch))
    return record


def _amiss(row: BenchRow) -> str | None:
    """What in a row cannot have been measured; None where nothing."""
    if not row.samples_ms:
        return "no samples"
    if not all(0 < value < math.inf for value in row.samples_ms):
        return f"a latency of {next(v for v in row.samples_ms if not 0 < v < math.inf)} ms"
    if row.latency.samples != len(row.samples_ms):
        return f"{row.latency.samples} samples said to be, {len(row.samples_ms)} present"
    median = statistics.median(row.samples_ms)
    if not math.isclose(row.latency.median_ms, median, rel_tol=1e-9):
        return f"median_ms {row.latency.median_ms}, of the samples {median}"
    return None
