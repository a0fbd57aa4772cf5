"""The steps of the ladder with limits and verdicts, and how errors are spread over tokens and images."""

from __future__ import annotations

from collections.abc import Callable

from npu_runtime.parity.records import Localisation, OutputParity, ParityRecord
from npu_runtime.report.context import Context, Labelled
from npu_runtime.report.document import Block, Column, Figure, Section, Table, Text, Tone, columns, paragraph
from npu_runtime.report.spell import (
    absent,
    name_part,
    number,
    spell_cosine,
    spell_error,
    spell_limit,
    spell_optional,
    spell_share,
    verdict,
)
from npu_runtime.report.spread import image_spread, limits_figure, token_spread

FIGURES: tuple[tuple[str, Callable[[OutputParity], str]], ...] = (
    ("max_abs_error", lambda o: spell_error(o.metrics.max_abs_error)),
    ("mean_abs_error", lambda o: spell_error(o.metrics.mean_abs_error)),
    ("rmse", lambda o: spell_error(o.metrics.rmse)),
    ("max_relative_l2_error", lambda o: spell_error(o.metrics.max_relative_l2_error)),
    ("max_scaled_error", lambda o: spell_optional(o.metrics.max_scaled_error)),
    ("max_scaled_rmse", lambda o: spell_optional(o.metrics.max_scaled_rmse)),
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
    spread = [
        *limits_figure(context, given, record),
        *token_spread(context, given, record),
        *image_spread(context, given, record),
    ]
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
        session, cause = Text(context.with_batch(step)), Text(say(f"cause.{step.cause}"))
        baseline = Text(context.baseline(record, step))
        if not step.outputs:
            tone: Tone = "absent" if step.status == "not run" else "fail"
            status = Text(say(f"status.{step.status}"), tone)
            rows.append((session, *(Text("–"),) * 2, *(number("–"),) * 2, status, number("–"), cause, Text("–")))
        for output in step.outputs:
            first, images = (session, Text(name_part(say, output), "code")), number(str(output.metrics.images))
            for check in output.checks:
                judged = verdict(say, check.passed)
                if step.status == "interrupted":
                    judged = Text(say("status.interrupted"), "warn")
                figures = (number(spell_error(check.value)), number(spell_limit(check.limit)))
                metric = Text(say(f"metric.{check.metric}"))
                rows.append((*first, metric, *figures, judged, images, cause, baseline))
            if not output.checks and output.group is None:
                judged = Text(say("no limit"), "fail")
                rows.append((*first, Text("–"), number("–"), number("–"), judged, images, cause, baseline))
    return Table(say("table.ladder", label=given.label), heads, tuple(rows), given.command, grouped=2)


def _figures(context: Context, given: Labelled, record: ParityRecord) -> Table:
    say = context.say
    heads = columns(
        [say("column.step"), say("column.output"), say("column.tokens")],
        [say(f"metric.{metric}") for metric, _ in FIGURES],
    )
    rows = tuple(
        (
            Text(context.with_batch(step)),
            Text(output.output, "code"),
            Text(say("group.all") if output.group is None else say(f"group.{output.group}")),
            *(number(spell(output)) for _, spell in FIGURES),
        )
        for step in record.steps
        for output in step.outputs
    )
    return Table(say("table.figures", label=given.label), heads, rows, given.command, grouped=2)


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
            Text(context.with_batch(step)),
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
    figures = [say(f"column.{name}") for name in ("value", "limit", "share", "nonfinite")]
    heads = columns([say("column.module")], figures)
    rows = tuple(
        (
            Text(boundary.module, "code"),
            number(spell_error(boundary.relative_l2_error)),
            number(spell_limit(boundary.limit)),
            number(boundary.of_the_limit()),
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
