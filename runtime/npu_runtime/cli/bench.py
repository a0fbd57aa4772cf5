"""npu-runtime bench: eager against exported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from npu_runtime.artifact.store import Artifact, open_artifact
from npu_runtime.backends.table import EAGER, FORMATS, backend_name, backend_names
from npu_runtime.bench.measure import measure_latency
from npu_runtime.bench.statistics import NOISY, Comparison, Latency, compare_paired, summarise_latency
from npu_runtime.cli.console import (
    StepProgress,
    narration,
    print_conditions,
    print_json,
    print_line,
    print_table,
    print_weights,
)
from npu_runtime.cli.options import artifact_argument, json_option, parse_batches, run_options
from npu_runtime.devices import cpu_count
from npu_runtime.encoder import Encoder, RunOptions, load
from npu_runtime.environment import describe_environment
from npu_runtime.errors import Error, UnavailableError, UsageError
from npu_runtime.structured import to_json

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
@click.option("--weights", metavar="FILE|DIR", help="Where the checkpoint lies now, for eager.  [default: as recorded]")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads for one operator.  [default: cores of this process]",
)
@run_options
@json_option
def command(
    artifact: str,
    backends: tuple[str, ...],
    batch: tuple[int, ...] | None,
    iterations: int,
    warmup: int,
    weights: str | None,
    as_json: bool,
    **how: Unpack[RunOptions],
) -> None:
    """Time a call, numpy to numpy, of eager and of each frozen program, round by round in one run.

    Eager is the unmodified network, rebuilt from the checkpoint that the manifest records and only used
    when its tensors are the very ones that were exported. A backend that cannot run here is listed
    with the reason, unless it was named. A percentile is given from enough samples only: p90 from 20,
    p95 from 40, p99 from 100.

    Over eager: the median of the rounds' ratios, its 95 % interval, and what that allows to say: faster or slower
    where 1 is outside of it, the same where all of it is within 2 % of 1, else undecided.
    """
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
    used_threads = how["threads"] = how["threads"] or cpu_count()
    with contextlib.ExitStack() as stack:
        encoders, not_run = _open(opened, backends, batches, weights, how, stack)
        with _round_bar(len(batches) * (warmup + iterations)) as advance:
            samples = measure_latency(encoders, batches, iterations=iterations, warmup=warmup, progress=advance)
        conditions = {name: encoder.report() for name, encoder in encoders.items()}
    rows = {key: summarise_latency(values, key[1]) for key, values in samples.items()}
    over_eager = {
        (name, size): compare_paired(samples[EAGER, size], values) if EAGER in encoders and name != EAGER else None
        for (name, size), values in samples.items()
    }
    if as_json:
        return print_json(
            {
                "record": "bench",
                "artifact": str(opened.path),
                "digest": opened.digest,
                "weights": to_json(opened.manifest.provenance.weights),
                "environment": describe_environment(),
                "device": how["device"],
                "conditions": {name: to_json(report) for name, report in conditions.items()},
                "threads": used_threads,
                "warmup": warmup,
                "rows": [
                    {
                        "backend": name,
                        "batch": size,
                        **to_json(latency),
                        "over_eager": to_json(over_eager[name, size]),
                        "samples_ms": samples[name, size],
                    }
                    for (name, size), latency in rows.items()
                ],
                "not_run": not_run,
            }
        )
    print_weights(opened.manifest)
    _print_rows(opened, rows, over_eager, f"{iterations} rounds, {used_threads} threads, on {how['device']}")
    print_conditions(conditions)
    for name, reason in not_run.items():
        print_line(f"not run   {name}: {reason}")


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


@contextlib.contextmanager
def _round_bar(total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("measure"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds,"), TimeRemainingColumn())
    console = narration()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _print_rows(
    artifact: Artifact,
    rows: Mapping[tuple[str, int], Latency],
    over_eager: Mapping[tuple[str, int], Comparison | None],
    conditions: str,
) -> None:
    print_table(
        f"{artifact.manifest.encoder}, a call from numpy to numpy in ms, {conditions}",
        ("backend", "batch", "median", "iqr", "p90", "p95", "p99", "min", "max", "images/s", "over eager"),
        [
            (
                name,
                str(size),
                f"{r.median_ms:.2f}",
                f"{r.interquartile_range_ms:.2f}",
                _or_dash(r.p90_ms),
                _or_dash(r.p95_ms),
                _or_dash(r.p99_ms),
                f"{r.minimum_ms:.2f}",
                f"{r.maximum_ms:.2f}",
                f"{r.images_per_second:.1f}",
                _spell_comparison(over_eager[name, size]),
            )
            for (name, size), r in rows.items()
        ],
    )
    noisy = [
        f"{name} batch {size} ({r.interquartile_range_ms / r.median_ms:.0%})"
        for (name, size), r in rows.items()
        if r.noisy
    ]
    if noisy:
        print_line(f"noisy     {', '.join(noisy)}: interquartile range above {NOISY:.0%} of the median", warn=True)


def _spell_comparison(comparison: Comparison | None) -> str:
    """`2.27 x [2.20, 2.31] faster`."""
    if comparison is None:
        return "-"
    interval = comparison.interval
    told = "" if interval is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{comparison.speedup:.2f} x{told} {comparison.verdict}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
