"""The steps of the ladder with limits and verdicts, and how errors are spread over tokens and images."""

from __future__ import annotations

import math
from collections.abc import Callable

from npu_runtime.parity.metrics import ImageMetrics
from npu_runtime.parity.records import Localisation, OutputParity, ParityRecord, Step
from npu_runtime.parity.token_errors import PERCENTS
from npu_runtime.report.context import Context, Labelled
from npu_runtime.report.document import Block, Column, Figure, Section, Table, Text, Tone, columns, paragraph
from npu_runtime.report.evidence import exported_steps
from npu_runtime.report.plots import LimitedRow, SpreadRow, draw_limits, draw_points, draw_quantiles
from npu_runtime.report.spell import (
    absent,
    number,
    spell_cosine,
    spell_error,
    spell_limit,
    spell_share,
    verdict,
)

MOST_IMAGES = 20
"""Images whose figures are listed, the farthest off; the record holds the others."""

FIGURES: tuple[tuple[str, Callable[[OutputParity], str]], ...] = (
    ("max_abs_error", lambda o: spell_error(o.metrics.max_abs_error)),
    ("mean_abs_error", lambda o: spell_error(o.metrics.mean_abs_error)),
    ("rmse", lambda o: spell_error(o.metrics.rmse)),
    ("max_relative_l2_error", lambda o: spell_error(o.metrics.max_relative_l2_error)),
    ("mean_cosine", lambda o: spell_cosine(o.metrics.mean_cosine)),
    ("min_cosine", lambda o: spell_cosine(o.metrics.min_cosine)),
    ("mean_relative_error", lambda o: spell_error(o.metrics.mean_relative_error)),
    ("trimmed_relative_error", lambda o: spell_error(o.metrics.trimmed_relative_error)),
    ("top1_agreement", lambda o: spell_share(o.metrics.top1_agreement)),
    ("top5_agreement", lambda o: spell_share(o.metrics.top5_agreement)),
    ("neighbours_kept", lambda o: "–" if o.neighbours_kept is None else spell_share(o.neighbours_kept)),
)
"""Metric -> its figure over the images."""


def accuracy(context: Context) -> Section:
    say, parities = context.say, context.parities()
    if not parities:
        return context.section("accuracy", paragraph(absent(say, "accuracy.none")))
    parts = [_run(context, given, record) for given, record in parities]
    if len(parts) == 1:
        return context.section("accuracy", *parts[0])
    sections = [
        Section(given.label, f"{given.anchor}-accuracy", tuple(blocks)) for (given, _), blocks in zip(parities, parts)
    ]
    return context.section("accuracy", *sections)


def _run(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
    say = context.say
    tokens, images = _token_spread(context, given, record), _image_spread(context, given, record)
    spread = [*_limits_figure(context, given, record), *tokens, *images]
    blocks: list[Block] = [
        paragraph(say("accuracy.told")),
        _ladder(context, given, record),
        *(block for block in spread if isinstance(block, Figure)),
        _figures(context, given, record),
        *(block for block in spread if not isinstance(block, Figure)),
        *_profile(context, given, record),
    ]
    for localised in record.localised:
        blocks += _localised(context, given, localised)
    if not record.localised:
        blocks.append(paragraph(absent(say, "localised.none")))
    return blocks


def _ladder(context: Context, given: Labelled, record: ParityRecord) -> Table:
    """A row for each check of each step."""
    say = context.say
    names = ("step", "output", "metric", "value", "limit", "verdict", "images", "adds", "against")
    heads = tuple(Column(say(f"column.{name}"), name in ("value", "limit", "images")) for name in names)
    rows = []
    for step in record.steps:
        session, cause = Text(_with_batch(context, step)), Text(say(f"cause.{step.cause}"))
        baseline = Text(context.baseline(record, step))
        if not step.outputs:
            tone: Tone = "absent" if step.status == "not run" else "fail"
            status = Text(say(f"status.{step.status}"), tone)
            rows.append((session, *(Text("–"),) * 2, *(number("–"),) * 2, status, number("–"), cause, Text("–")))
        for output in step.whole_outputs:
            first, images = (session, Text(output.output, "code")), number(str(output.metrics.images))
            for check in output.checks:
                judged = verdict(say, check.passed)
                if step.status == "interrupted":
                    judged = Text(say("status.interrupted"), "warn")
                figures = (number(spell_error(check.value)), number(spell_limit(check.limit)))
                metric = Text(say(f"metric.{check.metric}"))
                rows.append((*first, metric, *figures, judged, images, cause, baseline))
            if not output.checks:
                judged = Text(say("no limit"), "fail")
                rows.append((*first, Text("–"), number("–"), number("–"), judged, images, cause, baseline))
    return Table(say("table.ladder", label=given.label), heads, tuple(rows), given.command, grouped=2)


def _with_batch(context: Context, step: Step) -> str:
    if not step.batches:
        return context.title(step)
    return context.say("step.batch", session=context.title(step), batch=context.say.join(step.batches))


def _limits_figure(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
    """The relative L2 errors of outputs beside their limits."""
    say, metric = context.say, "max_relative_l2_error"
    rows = []
    for series, step in enumerate(step for step in record.steps if step.outputs):
        for output in step.whole_outputs:
            limit = next((check.limit for check in output.checks if check.metric == metric), None)
            name = say("row.output", session=_with_batch(context, step), output=output.output)
            rows.append(LimitedRow(name, output.metrics.max_relative_l2_error, limit, series))
    if not rows:
        return []
    axis = say(f"metric.{metric}")
    svg = draw_limits(f"{given.anchor}-limits", rows, x_title=axis, limit_title=say("column.limit"))
    largest = max((row.value for row in rows), key=_order)
    description = say("figure.limits.alt", rows=len(rows), metric=axis, largest=spell_error(largest))
    return [Figure(svg, description, say("figure.limits", label=given.label), given.command)]


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _figures(context: Context, given: Labelled, record: ParityRecord) -> Table:
    say = context.say
    heads = columns(
        [say("column.step"), say("column.output"), say("column.tokens")],
        [say(f"metric.{metric}") for metric, _ in FIGURES],
    )
    rows = tuple(
        (
            Text(_with_batch(context, step)),
            Text(output.output, "code"),
            Text(say("group.all") if output.group is None else say(f"group.{output.group}")),
            *(number(spell(output)) for _, spell in FIGURES),
        )
        for step in record.steps
        for output in step.outputs
    )
    return Table(say("table.figures", label=given.label), heads, rows, given.command, grouped=2)


def _token_spread(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
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
        rows.append((Text(_with_batch(context, step)), Text(f"{output.output}: {kind}"), *figures, Text(worst)))
        if any(errors.quantiles):
            name = say("row.output", session=_with_batch(context, step), output=kind)
            bars.append(SpreadRow(name, errors.quantiles, series))
    blocks: list[Block] = []
    if bars:
        svg = draw_quantiles(f"{given.anchor}-tokens", bars, x_title=say("axis.token error"))
        largest = spell_error(max(bar.values[-1] for bar in bars))
        description = say("figure.tokens.alt", rows=len(bars), largest=largest)
        blocks.append(Figure(svg, description, say("figure.tokens", label=given.label), given.command))
    return [*blocks, Table(say("table.tokens", label=given.label), heads, tuple(rows), given.command, grouped=1)]


def _image_spread(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
    """Every image as a point, and the figures of those that are farthest off."""
    say = context.say
    points, rows = [], []
    for series, step in enumerate(exported_steps(record)):
        for output in step.whole_outputs:
            values = tuple(image.relative_l2_error for image in output.images)
            name = say("row.output", session=_with_batch(context, step), output=output.output)
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
            (Text(name, "code"), Text(_with_batch(context, step)), Text(output.output, "code"), *_image(image))
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


def _profile(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
    """The criteria of a profile, which decide nothing."""
    say = context.say
    if record.profile is None:
        return []
    heads = columns(
        [say("column.step"), say("column.output"), say("column.metric")],
        [say("column.value"), say("column.criterion")],
    ) + columns([say("column.verdict")])
    signs = {"at most": "≤", "at least": "≥"}
    rows = tuple(
        (
            Text(_with_batch(context, step)),
            Text(output.output, "code"),
            Text(say(f"metric.{check.metric}")),
            number(spell_cosine(check.value) if "cosine" in check.metric else spell_error(check.value)),
            number(f"{signs[check.comparison]} {check.limit:g}"),
            verdict(say, check.passed),
        )
        for step in record.steps
        for output in step.whole_outputs
        for check in output.profile
    )
    return [
        Table(say("table.profile", profile=record.profile, label=given.label), heads, rows, given.command, grouped=2)
    ]


def _localised(context: Context, given: Labelled, localised: Localisation) -> list[Block]:
    say = context.say
    session = say("localised.session", backend=localised.backend, device=localised.device, batch=localised.batch)
    heads = columns([say("column.module")], [say("column.value"), say("column.limit"), say("column.nonfinite")])
    rows = tuple(
        (
            Text(boundary.module, "code"),
            number(spell_error(boundary.relative_l2_error)),
            number(spell_limit(boundary.limit)),
            number(str(boundary.nonfinite)),
            verdict(say, boundary.passed),
        )
        for boundary in localised.boundaries
    )
    table = Table(
        say("table.boundaries", session=session), heads + columns([say("column.verdict")]), rows, given.command
    )
    if localised.first is None:
        found = say("localised.none beyond", session=session, count=len(localised.boundaries))
    else:
        found = say("localised.first", session=session, module=localised.first)
    parts = [Text(found, "plain" if localised.first is None else "fail")]
    if localised.failed_plain and not localised.failed_probed:
        parts.append(Text(say("localised.vanishes")))
    if localised.failed_probed and not localised.failed_plain:
        parts.append(Text(say("localised.probed alone")))
    return [paragraph(*parts), table]
