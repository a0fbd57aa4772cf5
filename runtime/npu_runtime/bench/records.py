"""What a benchmark measured, with every sample."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

from npu_runtime.artifact.schema import Numerics, Precision, Weights
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import GraphChoice, SessionReport, StageTimes
from npu_runtime.backends.table import EAGER, FORMATS
from npu_runtime.bench.cold import ColdStart
from npu_runtime.bench.statistics import Comparison, Latency, compare_paired, summarise_latency
from npu_runtime.bench.throughput import Load
from npu_runtime.devices import parse_device
from npu_runtime.environment import AcceleratorRecord

STAGES = tuple(stage.name for stage in fields(StageTimes))


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
    """None on the CPU, of backends that cannot tell, and where the run was interrupted before."""


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
    """Whether the run was interrupted: what was measured until then stands, in whole rounds and slices."""

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
    stages: Mapping[tuple[str, int], Sequence[StageTimes]] = MappingProxyType({}),
    loads: Mapping[tuple[str, int, int], Load] = MappingProxyType({}),
    load_seconds: float | None = None,
    partial: bool = False,
) -> BenchRecord:
    """The record of what was measured here and now, by backend and batch size: `samples` in milliseconds, `stages`,
    and `loads` by callers as well. What has no sample has no row.
    """
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
                _summarise_stages(stages[backend, batch]) if (backend, batch) in stages else None,
            )
            for (backend, batch), values in samples.items()
            if values
        ),
        not_run=not_run,
        file_nbytes=_file_nbytes(artifact, (*samples, *((backend, batch) for backend, batch, _ in loads))),
        cold=tuple(cold),
        cold_not_run=dict(cold_not_run),
        seconds=seconds,
        throughput=tuple(
            LoadRow(
                backend,
                batch,
                callers,
                load.seconds,
                len(load.latencies_ms),
                batch * len(load.latencies_ms) / load.seconds,
                summarise_latency(load.latencies_ms, batch),
                load.latencies_ms,
            )
            for (backend, batch, callers), load in sorted(
                loads.items(), key=lambda item: (item[0][1], list(conditions).index(item[0][0]), item[0][2])
            )
        ),
        load_seconds=load_seconds,
        partial=partial,
    )


def _summarise_stages(samples: Sequence[StageTimes]) -> Stages:
    medians = {stage: statistics.median(getattr(times, stage) for times in samples) for stage in STAGES}
    return Stages(**medians, samples=tuple(samples))


def _file_nbytes(artifact: Artifact, keys: Iterable[tuple[str, int]]) -> dict[str, int]:
    sizes = {record.file: record.nbytes for record in artifact.manifest.files}
    opened: dict[str, set[str]] = {}
    for backend, batch in keys:
        for program in artifact.manifest.programs:
            if FORMATS.get(program.format) == backend and program.batch == batch:
                opened.setdefault(backend, set()).update((program.file, *program.needs))
    return {backend: sum(sizes[file] for file in files) for backend, files in opened.items()}
