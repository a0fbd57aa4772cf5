"""npu-runtime bench: eager against exported."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npu_runtime.artifact.staging import check_new_file, write_file
from npu_runtime.artifact.store import Artifact, open_artifact
from npu_runtime.backends.table import EAGER, FORMATS, backend_name, backend_names
from npu_runtime.bench.against import Against, compare_records
from npu_runtime.bench.cold import STEADY_CALLS, ColdStart, start_cold
from npu_runtime.bench.measure import measure_latency
from npu_runtime.bench.records import BenchRecord, encode_csv, encode_record, make_record, read_record
from npu_runtime.bench.statistics import NOISY, Comparison, compare_paired, is_narrow
from npu_runtime.cli.console import (
    StepProgress,
    print_conditions,
    print_line,
    print_table,
    print_weights,
    spell_nbytes,
)
from npu_runtime.cli.options import artifact_argument, json_option, parse_batches, quiet_option, run_options
from npu_runtime.devices import cpu_count, parse_device
from npu_runtime.encoder import Encoder, RunOptions, load
from npu_runtime.environment import describe_accelerator, describe_environment
from npu_runtime.errors import Error, UnavailableError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack


@click.command()
@artifact_argument
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="Repeat for several.  [default: eager and all frozen]"
)
@click.option("--batch", callback=parse_batches, metavar="N,N…", help="Batch sizes.  [default: all that are frozen]")
@click.option("--iterations", type=click.IntRange(min=1), default=100, show_default=True, help="Timed rounds.")
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds before them.")
@click.option(
    "--adaptive", is_flag=True, help="End a batch size before its rounds are done where its intervals are narrow."
)
@click.option("--weights", metavar="FILE|DIR", help="Where the checkpoint lies now, for eager.  [default: as recorded]")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads for one operator.  [default: cores of this process]",
)
@click.option("--cold", is_flag=True, help="Time a start of each backend in a fresh process as well.")
@click.option(
    "--record", type=click.Path(path_type=Path), metavar="FILE", help="Write the record here as well, as JSON."
)
@click.option("--csv", type=click.Path(path_type=Path), metavar="FILE", help="Write the samples here, as CSV.")
@click.option("--force", is_flag=True, help="Replace the files of --record and --csv.")
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="OLD.json", help="Compare with the record of another run."
)
@run_options
@quiet_option
@json_option
def command(
    artifact: str,
    backends: tuple[str, ...],
    batch: tuple[int, ...] | None,
    iterations: int,
    warmup: int,
    adaptive: bool,
    cold: bool,
    weights: str | None,
    record: Path | None,
    csv: Path | None,
    force: bool,
    against: Path | None,
    as_json: bool,
    **how: Unpack[RunOptions],
) -> None:
    """Time a call, numpy to numpy, of eager and of each frozen program, round by round in one run.

    Eager is the unmodified network, rebuilt from the checkpoint that the manifest records and only used
    when its tensors are the very ones that were exported. A backend that cannot run here is listed
    with the reason, unless it was named. A percentile is given from enough samples only: p90 from 20,
    p95 from 40, p99 from 100.

    Over eager: the median of the rounds' ratios, its 95 % interval, and what that allows to say: faster or slower
    where 1 is outside of it, the same where all of it is within 2 % of 1, else undecided. With --adaptive a
    batch size ends as soon as, from 20 rounds on, the half width of every interval is below 1 % of its speedup;
    without eager it makes all of its rounds.

    With --cold each backend is started once more in a process of its own, at the smallest batch size: importing,
    loading, the first call and the steady ones, with the peak of the memory.

    With --against the medians stand beside those of an older record, over which the verdict is the ratio of the
    medians with an interval for runs that were not made together. Nothing is judged where the machine, the
    device, settings, versions, batch sizes or the artifact differ; the differences are listed.
    """
    for file in (record, csv):
        if file is not None:
            check_new_file(file, force=force)
    if record is not None and csv is not None and record.absolute() == csv.absolute():
        raise UsageError("--record and --csv name one file", where=record)
    old = None if against is None else read_record(against)
    opened = open_artifact(artifact)
    frozen = {program.batch for program in opened.manifest.programs}
    batches = batch or tuple(sorted(frozen))
    if set(batches) - frozen:
        raise UsageError(
            "the artifact was not frozen for this batch size",
            where=opened.path,
            expected=", ".join(map(str, sorted(frozen))),
            got=", ".join(map(str, batches)),
        )
    environment, start = describe_environment(), time.monotonic()
    threads = how["threads"] = how["threads"] or cpu_count()
    with contextlib.ExitStack() as stack:
        encoders, not_run = _open(opened, backends, batches, weights, how, stack)
        with _round_bar(len(batches) * (warmup + iterations)) as advance:
            samples = measure_latency(
                encoders,
                batches,
                iterations=iterations,
                warmup=warmup,
                progress=advance,
                enough=_all_narrow if adaptive else _never,
            )
        conditions = {name: encoder.report() for name, encoder in encoders.items()}
        accelerator = describe_accelerator(parse_device(how["device"]))
    cold_starts, cold_not_run = _start_cold(opened, encoders, min(batches), weights, how) if cold else ([], {})
    made = make_record(
        opened,
        samples,
        environment=environment,
        device=how["device"],
        accelerator=accelerator,
        conditions=conditions,
        threads=threads,
        numerics=how["numerics"],
        graph=how["graph"],
        allow_fallback=how["allow_fallback"],
        warmup=warmup,
        iterations=iterations,
        adaptive=adaptive,
        not_run=not_run,
        cold=cold_starts,
        cold_not_run=cold_not_run,
        seconds=time.monotonic() - start,
    )
    beside = None if old is None else compare_records(old, made, str(against))
    if record is not None:
        write_file(record, (encode_record(made) + "\n").encode())
    if csv is not None:
        write_file(csv, encode_csv(made).encode())
    if as_json:
        return click.echo(encode_record(made, beside))
    print_weights(opened.manifest)
    _print_rows(made)
    if beside is not None:
        _print_against(beside)
    if made.cold:
        _print_cold(made)
    for name, reason in made.cold_not_run.items():
        print_line(f"not run   cold start of {name}: {reason}")
    print_conditions(conditions)
    for name, reason in not_run.items():
        print_line(f"not run   {name}: {reason}")


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


def _open(
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
    not_run: dict[str, str] = {}
    steps = StepProgress()
    for name in dict.fromkeys(wanted):
        if not named and name == EAGER and EAGER not in backend_names():
            not_run[name] = "it comes with npu-export's extra `export`, which is not installed"
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


def _start_cold(
    artifact: Artifact, backends: Iterable[str], batch: int, weights: str | None, how: RunOptions
) -> tuple[list[ColdStart], dict[str, str]]:
    """A start of each backend, one after the other, and the reasons of those that failed."""
    starts: list[ColdStart] = []
    not_run: dict[str, str] = {}
    steps = StepProgress()
    for name in backends:
        try:
            with steps.step(f"start {name} in a fresh process"):
                starts.append(start_cold(str(artifact.path), name, batch, weights if name == EAGER else None, how))
        except Error as error:
            not_run[name] = error.got or error.what
    return starts, not_run


@contextlib.contextmanager
def _round_bar(total: int) -> Iterator[Callable[[], None]]:
    steps = StepProgress()
    with steps.step("measure"):
        advance = steps.count(total, "rounds")
        yield lambda: advance(1)


def _print_rows(record: BenchRecord) -> None:
    rounds = " and ".join(str(n) for n in sorted({len(row.samples_ms) for row in record.rows}))
    print_table(
        f"{record.encoder}, a call from numpy to numpy in ms, {rounds} rounds, {record.threads} threads, "
        f"on {record.device}",
        ("backend", "batch", "median", "iqr", "p90", "p95", "p99", "min", "max", "images/s", "over eager"),
        [
            (
                row.backend,
                str(row.batch),
                _or_dash(row.latency.median_ms),
                _or_dash(row.latency.interquartile_range_ms),
                _or_dash(row.latency.p90_ms),
                _or_dash(row.latency.p95_ms),
                _or_dash(row.latency.p99_ms),
                _or_dash(row.latency.minimum_ms),
                _or_dash(row.latency.maximum_ms),
                f"{row.latency.images_per_second:.1f}",
                _spell_comparison(row.over_eager),
            )
            for row in record.rows
        ],
    )
    noisy = [
        f"{row.backend} batch {row.batch} ({100 * row.latency.interquartile_range_ms / row.latency.median_ms:.0f} %)"
        for row in record.rows
        if row.latency.noisy
    ]
    if noisy:
        print_line(
            f"noisy     {', '.join(noisy)}: interquartile range above {100 * NOISY:.0f} % of the median", warn=True
        )


def _print_cold(record: BenchRecord) -> None:
    print_table(
        f"one start in a fresh process, batch {record.cold[0].batch}, in ms; steady after {STEADY_CALLS} calls",
        ("backend", "import", "load", "first", "steady", "host peak", "device peak", "files"),
        [
            (
                start.backend,
                f"{start.import_ms:.0f}",
                f"{start.load_ms:.0f}",
                f"{start.first_ms:.1f}",
                f"{start.steady_ms:.1f}",
                _size_or_dash(start.host_peak_nbytes),
                _size_or_dash(start.device_peak_nbytes),
                _size_or_dash(record.file_nbytes.get(start.backend)),
            )
            for start in record.cold
        ],
    )


def _size_or_dash(nbytes: int | None) -> str:
    return "-" if nbytes is None else spell_nbytes(nbytes)


def _print_against(against: Against) -> None:
    print_table(
        f"medians in ms against {against.old}",
        ("backend", "batch", "old", "new", "over old"),
        [
            (
                row.backend,
                str(row.batch),
                _or_dash(row.old_median_ms),
                _or_dash(row.new_median_ms),
                "not judged" if against.refused else _spell_comparison(row.comparison),
            )
            for row in against.rows
        ],
    )
    for difference in against.refused:
        print_line(f"differs   {difference}", warn=True)


def _spell_comparison(comparison: Comparison | None) -> str:
    """`2.27 x [2.20, 2.31] faster`."""
    if comparison is None:
        return "-"
    interval = comparison.interval
    told = "" if interval is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{comparison.speedup:.2f} x{told} {comparison.verdict}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
