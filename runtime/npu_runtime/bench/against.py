"""Two records side by side, judged only where nothing but the code differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from npu_runtime.backends.base import SessionReport
from npu_runtime.bench.records import BenchRecord
from npu_runtime.bench.statistics import Comparison, compare_apart

MACHINE = ("host", "processor", "machine", "cores_usable", "system")
"""Fields of the environment that tell machines apart."""


@dataclass(frozen=True, slots=True)
class AgainstRow:
    """One backend at one batch size in both records."""

    backend: str
    batch: int
    old_median_ms: float | None
    """None where the older record lacks it."""
    new_median_ms: float | None
    comparison: Comparison | None
    """The newer over the older; None where one lacks it and where the records are not judged."""


@dataclass(frozen=True, slots=True)
class AgainstLoad:
    """One backend at one batch size under the load of as many callers in both records.

    There is no verdict: the calls of a slice wait for each other, so that an interval as of independent samples
    would be too narrow.
    """

    backend: str
    batch: int
    callers: int
    old_images_per_second: float
    new_images_per_second: float
    old_p50_ms: float | None
    new_p50_ms: float | None


@dataclass(frozen=True, slots=True)
class Against:
    """A record beside an older one."""

    old: str
    """Where that was read from."""
    refused: tuple[str, ...]
    """What differs in the conditions, in words; where anything does, no row is judged."""
    rows: tuple[AgainstRow, ...]
    throughput: tuple[AgainstLoad, ...] = ()
    """Only what both records have."""
    partial: tuple[str, ...] = ()
    """Which of the two runs was interrupted: `old`, `new`."""


def compare_records(old: BenchRecord, new: BenchRecord, where: str) -> Against:
    """Medians side by side, of `old` as read from `where`, with verdicts where the conditions are the same.

    A verdict speaks of these two runs: what else the machine did in either is not in its interval. Of a run that
    was interrupted the rows that it has are compared, where they are of the same batch sizes.
    """
    refused = differences(old, new)
    before = {(row.backend, row.batch): row for row in old.rows}
    after = {(row.backend, row.batch): row for row in new.rows}
    rows = []
    for key in dict.fromkeys((*after, *before)):
        a, b = before.get(key), after.get(key)
        rows.append(
            AgainstRow(
                *key,
                None if a is None else a.latency.median_ms,
                None if b is None else b.latency.median_ms,
                None if refused or a is None or b is None else compare_apart(a.samples_ms, b.samples_ms),
            )
        )
    partial = tuple(name for name, record in (("old", old), ("new", new)) if record.partial)
    return Against(where, refused, tuple(rows), tuple(_loads_beside(old, new)), partial)


def _loads_beside(old: BenchRecord, new: BenchRecord) -> Iterator[AgainstLoad]:
    before = {(load.backend, load.batch, load.callers): load for load in old.throughput}
    for load in new.throughput:
        other = before.get((load.backend, load.batch, load.callers))
        if other is not None:
            yield AgainstLoad(
                load.backend,
                load.batch,
                load.callers,
                other.images_per_second,
                load.images_per_second,
                other.latency.p50_ms,
                load.latency.p50_ms,
            )


def differences(old: BenchRecord, new: BenchRecord) -> tuple[str, ...]:
    """What differs in the conditions of two records, in words; rounds and warm-up may differ."""
    told: list[str] = []

    def tell(what: str, a: object, b: object) -> None:
        if a != b:
            told.append(f"{what}: {_spell(a)} and {_spell(b)}")

    tell("artifact", old.digest[:12], new.digest[:12])
    tell("backends", tuple(old.conditions), tuple(new.conditions))
    tell("batch sizes", old.batches, new.batches)
    for name in MACHINE:
        tell(name.replace("_", " "), old.environment.get(name), new.environment.get(name))
    tell("device", old.device, new.device)
    tell("accelerator", _accelerator(old), _accelerator(new))
    for name in ("threads", "numerics", "graph", "allow_fallback"):
        tell(name.replace("_", " "), getattr(old, name), getattr(new, name))
    for what in ("versions", "variables"):
        a, b = _mapping(old.environment.get(what)), _mapping(new.environment.get(what))
        for name in dict.fromkeys((*a, *b)):
            tell(f"version of {name}" if what == "versions" else name, a.get(name), b.get(name))
    for backend in old.conditions:
        if backend in new.conditions:
            one, other = _conditions(old.conditions[backend]), _conditions(new.conditions[backend])
            for name in dict.fromkeys((*one, *other)):
                tell(f"{name} of {backend}", one.get(name), other.get(name))
    return tuple(told)


def _conditions(report: SessionReport) -> dict[str, object]:
    """What a session's speed depends on; what was measured on the way is left out."""
    graphs = {f"graph replay of batch {graph.batch}": graph.replayed for graph in report.graphs}
    fallback = "unknown" if report.fallback is None else report.fallback
    return {**report.numerics, "fallback": fallback, **graphs}


def _accelerator(record: BenchRecord) -> tuple[str | None, ...]:
    found = record.accelerator
    return () if found is None else (found.name, found.software)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
