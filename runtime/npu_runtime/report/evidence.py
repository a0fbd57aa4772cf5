"""What was run: the inputs, what came out, and the images themselves."""

from __future__ import annotations

from npu_runtime.backends.table import EAGER
from npu_runtime.parity.inputs import InputRecord
from npu_runtime.parity.records import ParityRecord, Step
from npu_runtime.parity.thumbnails import Thumbnails
from npu_runtime.report.context import Context, Labelled
from npu_runtime.report.document import Block, Picture, Pictures, Section, Table, Text, columns, paragraph
from npu_runtime.report.spell import absent, number, spell_cosine, spell_error

MOST_INPUTS = 24
"""Inputs that are listed; the record holds the others."""


def evidence(context: Context) -> Section:
    say = context.say
    blocks: list[Block] = [_outputs(context)]
    if not context.parities():
        blocks.append(paragraph(absent(say, "evidence.none")))
    for given, record in context.parities():
        blocks += _inputs(context, given, record)
    return context.section("evidence", *blocks)


def _outputs(context: Context) -> Block:
    say, manifest = context.say, context.subject.manifest
    if manifest is None:
        return paragraph(absent(say, "evidence.no manifest"))
    heads = columns([say("column.tensor"), say("column.dtype"), say("column.shape"), say("column.groups")])
    rows = tuple(
        (
            Text(spec.name, "code"),
            Text(spec.dtype, "code"),
            Text(f"[{', '.join(map(str, spec.shape))}]", "code"),
            Text(
                say.join(f"{say(f'group.{group.name}')} {group.start}–{group.stop - 1}" for group in spec.groups) or "–"
            ),
        )
        for spec in (*manifest.inputs, *manifest.outputs)
    )
    return Table(say("table.tensors"), heads, rows, context.export_command)


def _inputs(context: Context, given: Labelled, record: ParityRecord) -> list[Block]:
    say = context.say
    heads = columns([say("column.input"), say("column.kind"), say("column.original"), "sha256 (pixel_values)"])
    rows = tuple(
        (
            Text(taken.name, "code"),
            Text(say(f"input.{taken.kind}")),
            Text("–" if taken.thumbnails is None else f"{taken.thumbnails.width} × {taken.thumbnails.height}"),
            Text(taken.sha256, "code"),
        )
        for taken in record.inputs[:MOST_INPUTS]
    )
    blocks: list[Block] = [Table(say("table.inputs", label=given.label), heads, rows, given.command)]
    if len(record.inputs) > MOST_INPUTS:
        blocks.append(paragraph(say("more inputs", shown=MOST_INPUTS, all=len(record.inputs))))
    pictures = [_picture(context, record, taken, taken.thumbnails) for taken in record.inputs if taken.thumbnails]
    if pictures:
        blocks.append(
            Pictures(
                say("pictures.caption", label=given.label),
                say("pictures.published"),
                say("pictures.preprocessed"),
                tuple(pictures),
                given.command,
            )
        )
    elif any(taken.kind == "image" for taken in record.inputs):
        blocks.append(paragraph(absent(say, "pictures.none")))
    return blocks


def _picture(context: Context, record: ParityRecord, taken: InputRecord, thumbnails: Thumbnails) -> Picture:
    say, name = context.say, taken.name
    figures = []
    for step in exported_steps(record):
        if name not in step.inputs:
            continue
        index = step.inputs.index(name)
        for output in step.whole_outputs:
            if index < len(output.images):
                image = output.images[index]
                told = say(
                    "picture.figures",
                    session=context.title(step),
                    output=output.output,
                    error=spell_error(image.max_abs_error),
                    cosine=spell_cosine(image.mean_cosine),
                )
                figures.append(number(told))
    return Picture(
        name,
        thumbnails.published,
        thumbnails.preprocessed,
        say("picture.published", name=name, width=thumbnails.width, height=thumbnails.height),
        say("picture.preprocessed", name=name),
        tuple(figures) or (absent(say),),
    )


def exported_steps(record: ParityRecord) -> list[Step]:
    """The steps of exported programs on the record's device that gave figures."""
    return [s for s in record.steps if s.backend != EAGER and s.device == record.device and s.outputs]
