"""Bench records as JSON that another machine can read, and their samples as CSV.

Versions of the schema:
    1.0  first.
    1.1  stages of rows on accelerators, throughput under load, and records of runs that were interrupted.
    1.2  conditions.fallback may be null: unknown, where it was an empty list before; conditions.arithmetic of
         attention, softmax, layer_norm and rms_norm, and its dtypes.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from npu_runtime.bench.records import STAGES, BenchRecord, BenchRow, LoadRow
from npu_runtime.errors import Error
from npu_runtime.structured import DAMAGED, RecordSchema, read_record_text

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 2

CSV_COLUMNS = ("backend", "batch", "round", "latency_ms")

SCHEMA = RecordSchema("bench", BenchRecord, SCHEMA_MAJOR, SCHEMA_MINOR, ("against",), "npu-runtime bench")


def encode_record(record: BenchRecord, against: object = None) -> str:
    """The record as indented JSON, and beside it how it compares with another."""
    return SCHEMA.encode(record, {} if against is None else {"against": against})


def encode_csv(record: BenchRecord) -> str:
    """The samples of the rounds, one a line under CSV_COLUMNS, each number with all of its digits; rounds count from 0.

    Latencies under load are other figures and are left out, lest a table mix the two.
    """
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
    return decode_record(read_record_text(path), str(path))


def decode_record(text: str, where: str) -> BenchRecord:
    """The record in `text`, read from `where`; see `read_record`."""
    record = SCHEMA.decode(text, where)
    _check_rows("rows", record.rows, where)
    _check_rows("throughput", record.throughput, where)
    return record


def _check_rows(at: str, rows: Sequence[BenchRow | LoadRow], where: str) -> None:
    seen: set[tuple[object, ...]] = set()
    for index, row in enumerate(rows):
        amiss = _amiss(row)
        key = (row.backend, row.batch, row.callers if isinstance(row, LoadRow) else None)
        if key in seen:
            amiss = f"a second row of {row.backend} batch {row.batch}"
        if amiss is not None:
            raise Error(
                f"the record has wrong figures at {at}[{index}]",
                where=where,
                expected="positive latencies, and statistics that are theirs",
                got=amiss,
                hint=DAMAGED,
            )
        seen.add(key)


def _amiss(row: BenchRow | LoadRow) -> str | None:
    """What in a row cannot have been measured; None where nothing."""
    if not row.samples_ms:
        return "no samples"
    if not all(0 < value < math.inf for value in row.samples_ms):
        return f"a latency of {next(v for v in row.samples_ms if not 0 < v < math.inf)} ms"
    if isinstance(row, LoadRow) and not 0 < row.seconds < math.inf:
        return f"{row.seconds} seconds"
    calls = row.calls if isinstance(row, LoadRow) else row.latency.samples
    if not len(row.samples_ms) == row.latency.samples == calls:
        return f"{row.latency.samples} samples of {calls} calls said to be, {len(row.samples_ms)} present"
    for name, told, own in _figures(row):
        if not math.isclose(told, own, rel_tol=1e-9):
            return f"{name} {told}, of the samples {own}"
    return None


def _figures(row: BenchRow | LoadRow) -> Iterator[tuple[str, float, float]]:
    """Figures by name that a row tells, each with what its samples make it."""
    yield "median_ms", row.latency.median_ms, statistics.median(row.samples_ms)
    if isinstance(row, LoadRow):
        yield "images_per_second", row.images_per_second, row.batch * row.calls / row.seconds
    elif row.stages is not None and row.stages.samples:
        for stage in STAGES:
            samples = [getattr(times, stage) for times in row.stages.samples]
            yield stage, getattr(row.stages, stage), statistics.median(samples)
