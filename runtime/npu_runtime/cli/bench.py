"""npu-runtime bench: eager against exported."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npu_runtime.artifact.staging import check_new_file, write_file
from npu_runtime.artifact.store import open_artifact
from npu_runtime.bench.against import compare_records
from npu_runtime.bench.record_files import encode_csv, encode_record, read_record
from npu_runtime.bench.records import make_record
from npu_runtime.cli.bench_steps import Kept, measure_calls, measure_load, open_encoders, time_cold_starts
from npu_runtime.cli.bench_tables import print_against, print_bench
from npu_runtime.cli.console import INTERRUPTED
from npu_runtime.cli.options import (
    artifact_argument,
    json_option,
    parse_batches,
    parse_callers,
    parse_seconds,
    quiet_option,
    run_options,
)
from npu_runtime.devices import cpu_count, parse_device
from npu_runtime.encoder import RunOptions, require_frozen
from npu_runtime.environment import describe_accelerator, describe_environment
from npu_runtime.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOAD_SECONDS = 10.0
"""What --seconds is without being given."""


@click.command()
@artifact_argument
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="Repeat for several.  [default: eager and all frozen]"
)
@click.option("--batch", callback=parse_batches, metavar="N,N…", help="Batch sizes.  [default: all that are frozen]")
@click.option(
    "--iterations", type=click.IntRange(min=0), default=100, show_default=True, help="Timed rounds; 0: load alone."
)
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds before them.")
@click.option(
    "--adaptive", is_flag=True, help="End a batch size before its rounds are done where its intervals are narrow."
)
@click.option("--weights", metavar="FILE|DIR", help="Where the checkpoint lies now, for eager.  [default: as recorded]")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads for one operator.  [default: the cores of this process, limits of cgroups included]",
)
@click.option(
    "--callers",
    callback=parse_callers,
    metavar="N,N…",
    help="Measure throughput under the load of so many callers as well.",
)
@click.option("--seconds", callback=parse_seconds, metavar="T", help="Length of each load.  [default: 10]")
@click.option("--cold", is_flag=True, help="Time a start of each backend in a fresh process as well.")
@click.option(
    "--record", type=click.Path(path_type=Path), metavar="FILE", help="Write the record here as well, as JSON."
)
@click.option(
    "--csv", type=click.Path(path_type=Path), metavar="FILE", help="Write the samples of the rounds here, as CSV."
)
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
    callers: tuple[int, ...] | None,
    seconds: float | None,
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
    p95 from 40, p99 from 100. On an accelerator transfers and compute are timed apart in 20 rounds more at most.

    Over eager: the median of the rounds' ratios, its 95 % interval, and what that allows to say: faster or slower
    where 1 is outside of it, the same where all of it is within 2 % of 1, else undecided. With --adaptive a
    batch size ends as soon as, from 20 rounds on, the half width of every interval is below 1 % of its speedup;
    without eager it makes all of its rounds.

    With --callers so many threads share each backend, each calling again as soon as it has its result, for --seconds
    in four slices, each after a warm-up: images a second, and latencies under that load. --threads is for one call,
    so on the CPU callers contend for the cores; on an accelerator their calls queue.

    With --cold each backend is started once more in a process of its own, at the smallest batch size: importing,
    loading, the first call and the steady ones, with the peak of the memory.

    With --against the medians stand beside those of an older record, over which the verdict is the ratio of the
    medians with an interval for runs that were not made together. Nothing is judged where the machine, the
    device, settings, versions, batch sizes or the artifact differ; the differences are listed. Throughputs stand
    beside each other without a verdict.

    Ctrl-C keeps what was measured, in whole rounds and slices, and marks the record partial; the exit code is 130.
    """
    for file in (record, csv):
        if file is not None:
            check_new_file(file, force=force)
    if record is not None and csv is not None and record.absolute() == csv.absolute():
        raise UsageError("--record and --csv name one file", where=record)
    if seconds is not None and callers is None:
        raise UsageError("--seconds is for the load of --callers, which is not given", got=f"--seconds {seconds:g}")
    if iterations == 0 and callers is None:
        raise UsageError("nothing is to be measured", expected="rounds, or --callers", got="--iterations 0")
    load_seconds = LOAD_SECONDS if seconds is None else seconds
    old = None if against is None else read_record(against)
    opened = open_artifact(artifact)
    frozen = sorted({program.batch for program in opened.manifest.programs})
    batches = tuple(dict.fromkeys(batch or frozen))
    require_frozen(opened, batches, frozen)
    environment, start = describe_environment(), time.monotonic()
    threads = how["threads"] = how["threads"] or cpu_count()
    kept = Kept()
    interrupted = False
    with contextlib.ExitStack() as stack:
        encoders, not_run = open_encoders(opened, backends, batches, weights, how, stack)
        try:
            if iterations:
                measure_calls(kept, encoders, batches, iterations, warmup, adaptive)
            if callers is not None:
                measure_load(kept, encoders, batches, callers, load_seconds)
        except KeyboardInterrupt:
            if not (any(kept.samples.values()) or kept.loads):
                raise
            interrupted = True
        conditions = {name: encoder.report() for name, encoder in encoders.items()}
        accelerator = describe_accelerator(parse_device(how["device"]))
    if cold and not interrupted:
        try:
            time_cold_starts(kept, opened, encoders, min(batches), weights, how)
        except KeyboardInterrupt:
            interrupted = True
    made = make_record(
        opened,
        kept.samples,
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
        cold=kept.cold,
        cold_not_run=kept.cold_not_run,
        seconds=time.monotonic() - start,
        stages=kept.stages,
        loads=kept.loads,
        load_seconds=None if callers is None else load_seconds,
        partial=interrupted,
    )
    beside = None if old is None else compare_records(old, made, str(against))
    if record is not None:
        write_file(record, (encode_record(made) + "\n").encode())
    if csv is not None:
        write_file(csv, encode_csv(made).encode())
    if as_json:
        click.echo(encode_record(made, beside))
    else:
        print_bench(made)
        if beside is not None:
            print_against(beside)
    click.get_current_context().exit(INTERRUPTED if interrupted else 0)
