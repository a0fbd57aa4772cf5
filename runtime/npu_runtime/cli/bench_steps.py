"""The steps of a benchmark, with their progress on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import StageTimes
from npu_runtime.backends.table import EAGER, FORMATS, backend_name, backend_names, require_eager_for, require_replay
from npu_runtime.bench.cold import ColdStart, start_cold
from npu_runtime.bench.measure import STAGE_ROUNDS, measure_latency, measure_stages
from npu_runtime.bench.statistics import compare_paired, is_narrow
from npu_runtime.bench.throughput import SLICES, Load, measure_throughput
from npu_runtime.cli.console import StepProgress
from npu_runtime.devices import parse_device
from npu_runtime.encoder import Encoder, RunOptions, load
from npu_runtime.errors import Error, UnavailableError, UsageError
from npu_runtime.steps import Advance


@dataclass(slots=True)
class Kept:
    """What a run has measured so far, in whole rounds and slices, so that an interruption leaves it as it is."""

    samples: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    stages: dict[tuple[str, int], list[StageTimes]] = field(default_factory=dict)
    loads: dict[tuple[str, int, int], Load] = field(default_factory=dict)
    cold: list[ColdStart] = field(default_factory=list)
    cold_not_run: dict[str, str] = field(default_factory=dict)


def measure_calls(
    kept: Kept,
    encoders: Mapping[str, Encoder],
    batches: Sequence[int],
    iterations: int,
    warmup: int,
    adaptive: bool,
) -> None:
    images = sum(batches) * len(encoders) * (warmup + iterations)  # which take about as long at any batch size
    with _bar("measure", "images", images) as advance:
        measure_latency(
            encoders,
            batches,
            iterations=iterations,
            warmup=warmup,
            advance=advance,
            enough=_all_narrow if adaptive else _never,
            samples=kept.samples,
        )
    if any(encoder.device.kind != "cpu" for encoder in encoders.values()):
        with StepProgress().step("time transfers and compute apart"):
            kept.stages.update(measure_stages(encoders, batches, rounds=min(iterations, STAGE_ROUNDS)))


def measure_load(
    kept: Kept, encoders: Mapping[str, Encoder], batches: Sequence[int], callers: Sequence[int], seconds: float
) -> None:
    with _bar("measure under load", "slices", len(batches) * len(callers) * len(encoders) * SLICES) as advance:
        measure_throughput(encoders, batches, callers, kept.loads, seconds=seconds, advance=advance)


def _all_narrow(samples: Mapping[str, Sequence[float]]) -> bool:
    """Whether every backend's speedup over eager is known well enough; never where there is none."""
    speedups = [
        is_narrow(compare_paired(samples[EAGER], values), len(values))
        for name, values in samples.items()
        if name != EAGER and EAGER in samples
    ]
    return bool(speedups) and all(speedups)


def _never(_: object) -> bool:
    return False


def open_encoders(
    artifact: Artifact,
    named: Sequence[str],
    batches: Sequence[int],
    weights: str | None,
    how: RunOptions,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, Encoder], dict[str, str]]:
    """Encoders by backend, and the reasons of those that cannot run; a named one must."""
    wanted = [backend_name(name) for name in named]
    if not named:
        wanted = [EAGER, *(FORMATS[format] for format in artifact.manifest.formats() if format in FORMATS)]
    if weights is not None and EAGER not in wanted:
        raise UsageError("--weights is for eager, which is not among the backends", got=", ".join(wanted))
    encoders: dict[str, Encoder] = {}
    not_run = _without_opening(wanted, how, named=bool(named), weights=weights)
    steps = StepProgress()
    for name in dict.fromkeys(wanted):
        if name in not_run:
            continue
        own_weights = weights if name == EAGER else None
        try:
            with steps.step(f"open {name}"):
                encoder = load(artifact, backend=name, batches=batches, weights=own_weights, **how)
        except Error as error:
            # Programs that are damaged are no reason to go on; a checkpoint or package that is elsewhere is.
            tolerable = name == EAGER and own_weights is None
            if named or not (tolerable or isinstance(error, UnavailableError)):
                raise
            not_run[name] = error.what if error.got is None else f"{error.what}: {error.got}"
            continue
        encoders[name] = stack.enter_context(encoder)
    if not encoders:
        raise UnavailableError(
            "no backend can run here", got="; ".join(f"{name}: {reason}" for name, reason in not_run.items())
        )
    return encoders, not_run


def _without_opening(wanted: Sequence[str], how: RunOptions, *, named: bool, weights: str | None) -> dict[str, str]:
    """The reasons of backends that cannot run whatever the artifact holds; a named one is an error."""
    not_run: dict[str, str] = {}
    if not named and EAGER not in backend_names():
        require_eager_for(weights)
        not_run[EAGER] = "it comes with npu-export's extra `export`, which is not installed"
    for name in wanted:
        if how["graph"] is True and name not in not_run:
            try:
                require_replay(name, parse_device(how["device"]))
            except UsageError as error:
                if named:
                    raise
                not_run[name] = error.what
    return not_run


def time_cold_starts(
    kept: Kept, artifact: Artifact, backends: Iterable[str], batch: int, weights: str | None, how: RunOptions
) -> None:
    """A start of each backend, one after the other, and the reasons of those that failed."""
    steps = StepProgress()
    for name in backends:
        own_weights = weights if name == EAGER else None
        try:
            with steps.step(f"start {name} in a fresh process"):
                kept.cold.append(start_cold(str(artifact.path), name, batch, own_weights, how))
        except Error as error:
            kept.cold_not_run[name] = error.got or error.what


@contextlib.contextmanager
def _bar(name: str, unit: str, total: int) -> Iterator[Advance]:
    steps = StepProgress()
    with steps.step(name):
        yield steps.count(total, unit)
