"""The drawings of a report: what is laid out how. Words come in the report's language."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_runtime.parity.token_errors import PERCENTS
from npu_runtime.report.svg import HATCHES, INK, LIMIT, MARKERS, PAPER, SERIES, Words, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.36
"""Inches of a row with its name above."""
AXIS = 0.62
"""Inches for the axis below, with its title."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A median, and the range that is drawn as its error bar."""

    at: float
    """Where along the axis: a batch size or a number of callers."""
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: tuple[Measured, ...]


def draw_bars(identifier: str, series: Sequence[Series], *, x_title: str, y_title: str) -> str:
    """A group of bars for each place, a bar for each series, with error bars."""

    def paint(axes: Axes, words: Words) -> None:
        places = sorted({point.at for line in series for point in line.points})
        width = 0.8 / len(series)
        for index, line in enumerate(series):
            shift = (index - (len(series) - 1) / 2) * width
            at = [places.index(point.at) + shift for point in line.points]
            axes.bar(
                at,
                [point.value for point in line.points],
                width,
                color=SERIES[index % len(SERIES)],
                hatch=HATCHES[index % len(HATCHES)],
                edgecolor=PAPER,
                label=words(line.name, 24),
            )
            _error_bars(axes, at, line.points)
        axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        axes.set_xlim(-0.6, len(places) - 0.4)
        axes.tick_params(axis="x", length=0)
        _finish(axes, words, x_title, y_title, len(series))

    return draw(identifier, 2.9, paint)


def draw_lines(identifier: str, series: Sequence[Series], *, x_title: str, y_title: str) -> str:
    """A line for each series over places that were measured, with error bars."""

    def paint(axes: Axes, words: Words) -> None:
        places = sorted({point.at for line in series for point in line.points})
        for index, line in enumerate(series):
            points = sorted(line.points, key=lambda point: point.at)
            at = [float(places.index(point.at)) for point in points]
            axes.plot(
                at,
                [point.value for point in points],
                color=SERIES[index % len(SERIES)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                linewidth=1.5,
                label=words(line.name, 24),
            )
            _error_bars(axes, at, points)
        axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        axes.set_xlim(-0.4, len(places) - 0.6)
        axes.set_ylim(bottom=0)
        _finish(axes, words, x_title, y_title, len(series))

    return draw(identifier, 2.9, paint)


@dataclass(frozen=True, slots=True)
class LimitedRow:
    """A value and the limit that it was judged by."""

    name: str
    value: float
    limit: float | None
    series: int


def draw_limits(identifier: str, rows: Sequence[LimitedRow], *, x_title: str, limit_title: str) -> str:
    """A row for each value on a logarithmic axis, with its limit; zeros stand at the left end, marked so."""

    def paint(axes: Axes, words: Words) -> None:
        scale = _log_rows(axes, words, [row.name for row in rows], [v for r in rows for v in (r.value, r.limit)])
        for index, row in enumerate(rows):
            at, colour = scale(row.value), SERIES[row.series % len(SERIES)]
            axes.plot([scale(0), at], [index, index], color=colour, linewidth=2.2, solid_capstyle="butt", alpha=0.55)
            axes.plot([at], [index], marker=MARKERS[row.series % len(MARKERS)], color=colour, markersize=5.5)
            if row.limit is not None:
                axes.plot([scale(row.limit)], [index], marker="|", color=LIMIT, markersize=13, markeredgewidth=2)
        axes.plot([], [], marker="|", color=LIMIT, markersize=9, markeredgewidth=2, ls="none", label=words(limit_title))
        _finish(axes, words, x_title, None, 1)

    return draw(identifier, AXIS + 0.25 + ROW * len(rows), paint)


@dataclass(frozen=True, slots=True)
class SpreadRow:
    """Errors of one kind: quantiles at PERCENTS, or single values."""

    name: str
    values: tuple[float, ...]
    series: int


def draw_quantiles(identifier: str, rows: Sequence[SpreadRow], *, x_title: str) -> str:
    """A row of nested bars: least to largest, 5 % to 95 %, 25 % to 75 %, and the median as a point."""

    def paint(axes: Axes, words: Words) -> None:
        scale = _log_rows(axes, words, [row.name for row in rows], [v for row in rows for v in row.values])
        for index, row in enumerate(rows):
            colour = SERIES[row.series % len(SERIES)]
            at = dict(zip(PERCENTS, map(scale, row.values)))
            for low, high, width in ((0, 100, 1.0), (1, 99, 2.2), (5, 95, 4.5), (25, 75, 8.5)):
                line = axes.plot([at[low], at[high]], [index, index], color=colour, linewidth=width, alpha=0.75)
                line[0].set_solid_capstyle("butt")
            axes.plot([at[50]], [index], marker="o", color=PAPER, markeredgecolor=INK, markersize=4.5)
        _finish(axes, words, x_title, None, 0)

    return draw(identifier, AXIS + ROW * len(rows), paint)


def draw_points(identifier: str, rows: Sequence[SpreadRow], *, x_title: str) -> str:
    """A row of points, one for each image."""

    def paint(axes: Axes, words: Words) -> None:
        scale = _log_rows(axes, words, [row.name for row in rows], [v for row in rows for v in row.values])
        for index, row in enumerate(rows):
            axes.plot(
                [scale(value) for value in row.values],
                [index] * len(row.values),
                marker=MARKERS[row.series % len(MARKERS)],
                color=SERIES[row.series % len(SERIES)],
                linestyle="none",
                markersize=4.5,
                alpha=0.7,
            )
        _finish(axes, words, x_title, None, 0)

    return draw(identifier, AXIS + ROW * len(rows), paint)


def _error_bars(axes: Axes, at: Sequence[float], points: Sequence[Measured]) -> None:
    axes.errorbar(
        at,
        [point.value for point in points],
        [[point.value - point.low for point in points], [point.high - point.value for point in points]],
        fmt="none",
        ecolor=INK,
        elinewidth=1,
        capsize=2.5,
    )


def _finish(axes: Axes, words: Words, x_title: str, y_title: str | None, entries: int) -> None:
    axes.set_xlabel(words(x_title))
    if y_title is not None:
        axes.set_ylabel(words(y_title))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    if entries:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=min(entries, 3), borderaxespad=0.2, columnspacing=1.2,
            handlelength=1.6,
        )  # fmt: skip


def _log_rows(
    axes: Axes, words: Words, names: Sequence[str], values: Sequence[float | None]
) -> Callable[[float], float]:
    """Rows with their names above, downwards, on an axis of decades; gives the place of a value on it.

    Zero stands one decade left of the least value, infinite and NaN one right of the largest.
    """
    usual = [value for value in values if value is not None and 0 < value < math.inf]
    first = math.floor(math.log10(min(usual))) if usual else -7
    last = max(math.ceil(math.log10(max(usual))), first + 1) if usual else -6
    has_zero = any(value == 0 for value in values)
    has_more = any(value is not None and not math.isfinite(value) for value in values)

    def scale(value: float) -> float:
        if not math.isfinite(value):
            return last + 0.6
        return first - 0.6 if value == 0 else math.log10(value)

    decades = range(first, last + 1, max(1, math.ceil((last - first) / 7)))
    ticks = [(float(decade), f"1e{decade}") for decade in decades]
    ticks = [(first - 0.6, "0")] * has_zero + ticks + [(last + 0.6, "∞")] * has_more
    axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.set_xlim(first - 0.75, last + (0.8 if has_more else 0.15))
    axes.set_ylim(len(names) - 0.5, -0.9)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    for index, name in enumerate(names):
        axes.text(first - 0.72, index - 0.3, words(name), va="bottom", fontsize=8, in_layout=False)
    return scale
