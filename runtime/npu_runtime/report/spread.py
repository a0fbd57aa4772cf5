"""How errors lie beside their limits, over tokens and over images: plots, and tables of their numbers."""

from __future__ import annotations

import math

from npu_runtime.parity.metrics import ImageMetrics
from npu_runtime.parity.records import ParityRecord
from npu_runtime.parity.token_errors import PERCENTS
from npu_runtime.report.context import Context, Labelled
from npu_runtime.report.document import Block, Figure, Table, Text, columns, paragraph
from npu_runtime.report.evidence import exported_steps
from npu_runtime.report.plots import LimitedRow, SpreadRow, draw_limits, draw_points, draw_quantiles
from npu_runtime.report.spell import absent, number, spell_cosine, spell_error

MOST_IMAGES = 20
"""Images whose figures are listed, the farthest off; the record holds the others."""


def limits_figure(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
    """The errors of outputs beside their limits, each channel over its scale; relative L2 errors in older records."""
    say, metric = context.say, "max_scaled_rmse"
    if any(output.metrics.max_scaled_rmse is None for step in record.steps for output in step.outputs):
        metric = "max_relative_l2_error"
    rows = []
    for series, step in enumerate(step for step in record.steps if step.outputs):
        for output in step.whole_outputs:
            limit = next((check.limit for check in output.checks if check.metric == metric), None)
            name = say("row.output", session=context.with_batch(step), output=output.output)
            rows.append(LimitedRow(name, getattr(output.metrics, metric), limit, series))
    if not rows:
        return []
    axis = say(f"metric.{metric}")
    svg = draw_limits(f"{given.anchor}-limits", rows, x_title=axis, limit_title=say("column.limit"))
    largest = max((row.value for row in rows), key=_order)
    description = say("figure.limits.alt", rows=len(rows), metric=axis, largest=spell_error(largest))
    return [Figure(svg, description, say("figure.limits", label=given.label, metric=axis), given.command)]


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def token_spread(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
    say = context.say
    found = [
        (series, step, output)
        for series, step in enumerate(step for step in record.steps if step.outputs)
        for output in step.outputs
        if output.token_errors is not None
    ]
    if not found:
        return [paragraph(absent(say, "token errors.none"))]
    heads = columns(
        [say("column.step"), say("column.tokens")], [say("column.count"), *(f"{p} %" for p in PERCENTS)]
    ) + columns([say("column.worst token")])
    rows, bars = [], []
    for series, step, output in found:
        errors = output.token_errors
        assert errors is not None
        kind = say("group.all") if output.group is None else say(f"group.{output.group}")
        worst = say("worst token", token=errors.worst_token, input=step.inputs[errors.worst_image])
        figures = (number(f"{errors.tokens:,}"), *(number(spell_error(value)) for value in errors.quantiles))
        rows.append((Text(context.with_batch(step)), Text(f"{output.output}: {kind}"), *figures, Text(worst)))
        if any(errors.quantiles):
            name = say("row.output", session=context.with_batch(step), output=kind)
            bars.append(SpreadRow(name, errors.quantiles, series))
    blocks: list[Block] = []
    if bars:
        svg = draw_quantiles(f"{given.anchor}-tokens", bars, x_title=say("axis.token error"))
        largest = spell_error(max(bar.values[-1] for bar in bars))
        description = say("figure.tokens.alt", rows=len(bars), largest=largest)
        blocks.append(Figure(svg, description, say("figure.tokens", label=given.label), given.command))
    return [*blocks, Table(say("table.tokens", label=given.label), heads, tuple(rows), given.command, grouped=1)]


def image_spread(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
    """Every image as a point, and the figures of those that are farthest off."""
    say = context.say
    points, rows = [], []
    for series, step in enumerate(exported_steps(record)):
        for output in step.whole_outputs:
            values = tuple(image.relative_l2_error for image in output.images)
            name = say("row.output", session=context.with_batch(step), output=output.output)
            points.append(SpreadRow(name, values, series + 1))
            rows += [(step, output, name, image) for name, image in zip(step.inputs, output.images)]
    if not rows:
        return []
    rows.sort(key=lambda row: _order(row[3].relative_l2_error), reverse=True)
    heads = columns(
        [say("column.input"), say("column.step"), say("column.output")],
        [say(f"metric.{name}") for name in ("relative_l2_error", "max_abs_error", "mean_cosine", "min_cosine")],
    )
    table = Table(
        say("table.images", label=given.label),
        heads,
        tuple(
            (Text(name, "code"), Text(context.with_batch(step)), Text(output.output, "code"), *_image(image))
            for step, output, name, image in rows[:MOST_IMAGES]
        ),
        given.command,
    )
    svg = draw_points(f"{given.anchor}-images", points, x_title=say("axis.image error"))
    largest = spell_error(rows[0][3].relative_l2_error)
    description = say("figure.images.alt", points=len(rows), largest=largest)
    figure = Figure(svg, description, say("figure.images", label=given.label), given.command)
    more = [paragraph(say("more images", shown=MOST_IMAGES, all=len(rows)))] if len(rows) > MOST_IMAGES else []
    return [figure, table, *more]


def _image(image: ImageMetrics) -> tuple[Text, ...]:
    return (
        number(spell_error(image.relative_l2_error)),
        number(spell_error(image.max_abs_error)),
        number(spell_cosine(image.mean_cosine)),
        number(spell_cosine(image.min_cosine)),
    )
