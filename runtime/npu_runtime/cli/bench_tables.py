"""What bench records say, as tables on stdout: after a run, and wherever one is shown."""

from __future__ import annotations

from npu_runtime.bench.against import Against
from npu_runtime.bench.cold import STEADY_CALLS
from npu_runtime.bench.records import BenchRecord
from npu_runtime.bench.statistics import NOISY, Comparison
from npu_runtime.cli.console import print_conditions, print_line, print_table, spell_nbytes
from npu_runtime.cli.progress import spell_number


def print_bench(record: BenchRecord) -> None:
    """Everything that a record holds but its samples."""
    random = record.weights.random_seed is not None
    print_line(f"weights   {record.summary}", warn=random)
    if record.partial:
        print_line("partial   the run was interrupted; what follows was measured until then", warn=True)
    _print_rows(record)
    _print_stages(record)
    _print_throughput(record)
    if record.cold:
        _print_cold(record)
    for name, reason in record.cold_not_run.items():
        print_line(f"not run   cold start of {name}: {reason}")
    print_conditions(record.conditions)
    for name, reason in record.not_run.items():
        print_line(f"not run   {name}: {reason}")


def _print_rows(record: BenchRecord) -> None:
    if not record.rows:
        return
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
                spell_number(row.latency.images_per_second),
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


def _print_stages(record: BenchRecord) -> None:
    rows = [(row, row.stages) for row in record.rows if row.stages is not None]
    if not rows:
        return
    rounds = " and ".join(str(n) for n in sorted({len(stages.samples) for _, stages in rows}))
    print_table(
        f"stages of a call in ms, on the clock of {record.device}, medians of {rounds} rounds",
        ("backend", "batch", "transfer in", "compute", "transfer out"),
        [
            (
                row.backend,
                str(row.batch),
                f"{stages.transfer_in_ms:.3f}",
                f"{stages.compute_ms:.3f}",
                f"{stages.transfer_out_ms:.3f}",
            )
            for row, stages in rows
        ],
    )


def _print_throughput(record: BenchRecord) -> None:
    if not record.throughput:
        return
    print_table(
        f"{record.encoder} under load for {record.load_seconds:g} s each, latencies in ms, {record.threads} threads "
        f"for one call, on {record.device}",
        ("backend", "batch", "callers", "calls", "images/s", "p50", "p90", "p95", "p99"),
        [
            (
                load.backend,
                str(load.batch),
                str(load.callers),
                str(load.calls),
                spell_number(load.images_per_second),
                _or_dash(load.latency.p50_ms),
                _or_dash(load.latency.p90_ms),
                _or_dash(load.latency.p95_ms),
                _or_dash(load.latency.p99_ms),
            )
            for load in record.throughput
        ],
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


def print_against(against: Against) -> None:
    """How a record compares with an older one, as tables on stdout."""
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
    if against.throughput:
        print_table(
            f"under load, against {against.old}: images a second and p50 in ms",
            ("backend", "batch", "callers", "old images/s", "new images/s", "old p50", "new p50"),
            [
                (
                    load.backend,
                    str(load.batch),
                    str(load.callers),
                    spell_number(load.old_images_per_second),
                    spell_number(load.new_images_per_second),
                    _or_dash(load.old_p50_ms),
                    _or_dash(load.new_p50_ms),
                )
                for load in against.throughput
            ],
        )
    for name in against.partial:
        print_line(f"partial   the {name} run was interrupted", warn=True)
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
