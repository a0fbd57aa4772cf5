"""How fast: calls, callers, stages, starts, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from npu_runtime.backends.table import EAGER
from npu_runtime.bench.records import BenchRecord, BenchRow, LoadRow
from npu_runtime.report.context import Context, Labelled
from npu_runtime.report.document import Block, Column, Figure, Section, Table, Text, columns, paragraph
from npu_runtime.report.plots import Measured, Series, draw_bars, draw_lines
from npu_runtime.report.spell import absent, number, spell_ms, spell_rate, spell_size, spell_speedup


def performance(context: Context) -> Section:
    say, benches = context.say, context.benches()
    if not benches:
        return context.section("performance", paragraph(absent(say, "performance.none")))
    parts = [_run(context, given, record) for given, record in benches]
    if len(parts) == 1:
        return context.section("performance", *parts[0])
    sections = [
        Section(given.label, f"{given.anchor}-performance", tuple(blocks)) for (given, _), blocks in zip(benches, parts)
    ]
    return context.section("performance", *sections)


def _run(context: Context, given: Labelled, record: BenchRecord) -> list[Block]:
    say = context.say
    rounds = say.join(sorted({len(row.samples_ms) for row in record.rows}))
    told = say("performance.told", device=record.device, threads=record.threads, warmup=record.warmup, rounds=rounds)
    return [
        paragraph(told if record.rows else absent(say, "latency.none")),
        *(_latency(context, given, record) if record.rows else ()),
        *_load(context, given, record),
        *_stages(context, given, record),
        *_cold(context, given, record),
        *_sizes(context, given, record),
    ]


def _latency(context: Context, given: Labelled, record: BenchRecord) -> list[Block]:
    say = context.say
    first = ("batch", "median", "iqr", "rate", "speedup")
    rest = ("mean", "deviation", "least", "most", "p90", "p95", "p99")
    heads = (
        *columns([say("column.backend")], [say(f"column.{name}") for name in first]),
        *columns([say("column.verdict")], [say(f"column.{name}") for name in rest]),
    )
    rows = tuple(
        (
            Text(row.backend, "code"),
            number(str(row.batch)),
            number(spell_ms(row.latency.median_ms)),
            number(spell_ms(row.latency.interquartile_range_ms)),
            number(spell_rate(row.latency.images_per_second)),
            number("–" if row.over_eager is None else spell_speedup(say, row.over_eager)),
            _verdict(context, row),
            *map(number, _statistics(row)),
        )
        for row in record.rows
    )
    table = Table(say("table.latency", label=given.label), heads, rows, given.command)
    x_title, y_title, rate = say("axis.batch"), say("axis.latency"), say("axis.rate")
    series = _series(record.rows, lambda row: row.batch, _quartiles)
    medians = say.join(f"{r.backend} {r.batch}: {spell_ms(r.latency.median_ms)} ms" for r in record.rows)
    figures: list[Block] = [
        Figure(
            draw_bars(f"{given.anchor}-latency", series, x_title=x_title, y_title=y_title),
            say("figure.latency.alt", medians=medians),
            say("figure.latency", label=given.label),
            given.command,
        )
    ]
    if len({row.batch for row in record.rows}) > 1:
        curves = _series(record.rows, lambda row: row.batch, _rates)
        rates = say.join(f"{r.backend} {r.batch}: {spell_rate(r.latency.images_per_second)}" for r in record.rows)
        figures.append(
            Figure(
                draw_lines(f"{given.anchor}-rate", curves, x_title=x_title, y_title=rate),
                say("figure.rate.alt", rates=rates),
                say("figure.rate", label=given.label),
                given.command,
            )
        )
    not_run = [
        paragraph(Text(say("backend not run", backend=name), "absent"), Text(reason, "quoted"))
        for name, reason in record.not_run.items()
    ]
    return [*figures, table, *not_run]


def _statistics(row: BenchRow) -> list[str]:
    latency = row.latency
    values = (
        latency.mean_ms,
        latency.standard_deviation_ms,
        latency.minimum_ms,
        latency.maximum_ms,
        latency.p90_ms,
        latency.p95_ms,
        latency.p99_ms,
    )
    return ["–" if value is None else spell_ms(value) for value in values]


def _verdict(context: Context, row: BenchRow) -> Text:
    say = context.say
    noisy = say("noisy mark") if row.latency.noisy else ""
    if row.over_eager is None:
        return Text((say("verdict.baseline") if row.backend == EAGER else "–") + noisy)
    tones = {"faster": "pass", "slower": "fail", "same": "plain", "undecided": "warn"}
    judged = row.over_eager.verdict
    return Text(say(f"verdict.{judged}") + noisy, tones[judged])  # type: ignore[arg-type]


def _quartiles(row: BenchRow) -> tuple[float, float, float]:
    """Median and quartiles of the samples in ms."""
    low, high = (float(quartile) for quartile in np.percentile(row.samples_ms, (25, 75)))
    return row.latency.median_ms, low, high


def _rates(row: BenchRow) -> tuple[float, float, float]:
    """Images a second at the median, and at the quartiles."""
    median, low, high = _quartiles(row)
    return 1000 * row.batch / median, 1000 * row.batch / high, 1000 * row.batch / low


def _series(
    rows: Sequence[BenchRow], place: Callable[[BenchRow], float], measured: Callable[[BenchRow], tuple[float, ...]]
) -> list[Series]:
    backends = dict.fromkeys(row.backend for row in rows)
    return [
        Series(name, tuple(Measured(place(row), *measured(row)) for row in rows if row.backend == name))
        for name in backends
    ]


def _load(context: Context, given: Labelled, record: BenchRecord) -> list[Block]:
    say = context.say
    if not record.throughput:
        return [paragraph(absent(say, "load.none"))]
    names = ("batch", "callers", "calls", "seconds", "rate", "median", "p90", "p95", "p99")
    heads = (Column(say("column.backend")), *columns((), [say(f"column.{name}") for name in names]))
    rows = tuple((Text(row.backend, "code"), *map(number, _load_figures(row))) for row in record.throughput)
    blocks: list[Block] = []
    if len({row.callers for row in record.throughput}) > 1:
        keys = dict.fromkeys((row.backend, row.batch) for row in record.throughput)
        series = [
            Series(
                say("series.load", backend=backend, batch=batch),
                tuple(
                    Measured(r.callers, *(r.images_per_second,) * 3)
                    for r in record.throughput
                    if (r.backend, r.batch) == (backend, batch)
                ),
            )
            for backend, batch in keys
        ]
        svg = draw_lines(f"{given.anchor}-load", series, x_title=say("axis.callers"), y_title=say("axis.rate"))
        best = max(record.throughput, key=lambda row: row.images_per_second)
        description = say("figure.load.alt", backend=best.backend, rate=spell_rate(best.images_per_second))
        blocks.append(Figure(svg, description, say("figure.load", label=given.label), given.command))
    return [*blocks, Table(say("table.load", label=given.label), heads, rows, given.command)]


def _load_figures(row: LoadRow) -> list[str]:
    latency = row.latency
    times = (latency.median_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms)
    counts = [str(row.batch), str(row.callers), f"{row.calls:,}", f"{row.seconds:.1f}"]
    return [*counts, spell_rate(row.images_per_second), *("–" if t is None else spell_ms(t) for t in times)]


def _stages(context: Context, given: Labelled, record: BenchRecord) -> list[Block]:
    say = context.say
    staged = [(row, row.stages) for row in record.rows if row.stages is not None]
    if not staged:
        return [] if record.device == "cpu" else [paragraph(absent(say, "stages.none"))]
    heads = (
        Column(say("column.backend")),
        *columns((), [say(f"column.{name}") for name in ("batch", "transfer in", "compute", "transfer out")]),
    )
    rows = tuple(
        (
            Text(row.backend, "code"),
            number(str(row.batch)),
            number(spell_ms(stages.transfer_in_ms)),
            number(spell_ms(stages.compute_ms)),
            number(spell_ms(stages.transfer_out_ms)),
        )
        for row, stages in staged
    )
    return [Table(say("table.stages", label=given.label), heads, rows, given.command)]


def _cold(context: Context, given: Labelled, record: BenchRecord) -> list[Block]:
    say = context.say
    if not record.cold and not record.cold_not_run:
        return [paragraph(absent(say, "cold.none"))]
    names = ("batch", "import", "load", "first", "steady", "host peak", "device peak")
    heads = (Column(say("column.backend")), *columns((), [say(f"column.{name}") for name in names]))
    rows = tuple(
        (
            Text(start.backend, "code"),
            number(str(start.batch)),
            *(number(spell_ms(t)) for t in (start.import_ms, start.load_ms, start.first_ms, start.steady_ms)),
            *(
                absent(say) if nbytes is None else number(spell_size(nbytes))
                for nbytes in (start.host_peak_nbytes, start.device_peak_nbytes)
            ),
        )
        for start in record.cold
    )
    not_run = [
        paragraph(Text(say("cold not run", backend=name), "absent"), Text(reason, "quoted"))
        for name, reason in record.cold_not_run.items()
    ]
    return [Table(say("table.cold", label=given.label), heads, rows, given.command), *not_run] if rows else [*not_run]


def _sizes(context: Context, given: Labelled, record: BenchRecord) -> list[Block]:
    say = context.say
    heads = columns([say("column.backend")], [say("column.opened")])
    rows = tuple((Text(name, "code"), number(spell_size(nbytes))) for name, nbytes in record.file_nbytes.items())
    return [Table(say("table.opened", label=given.label), heads, rows, given.command)] if rows else []


def fastest(record: BenchRecord) -> BenchRow | None:
    """The exported program with the least median at the smallest batch size; None where none was measured."""
    exported = [row for row in record.rows if row.backend != EAGER]
    smallest = [row for row in exported if row.batch == min(row.batch for row in exported)]
    return min(smallest, key=lambda row: statistics.median(row.samples_ms), default=None)
