"""How much room the network leaves to float16's limits, and what was kept in float32 for it."""

from __future__ import annotations

from npu_runtime.artifact.range_text import spell_magnitude
from npu_runtime.artifact.schema import Manifest, ModuleRange, Ranges
from npu_runtime.report.context import Context
from npu_runtime.report.document import Section, Table, Text, columns, paragraph
from npu_runtime.report.spell import absent, number, spell_error

SHOWN = 10
"""Modules in the table, those with the least headroom."""


def ranges(context: Context) -> Section | None:
    """None for an artifact whose ranges were not measured, as of fp32, or whose manifest was not given."""
    say, manifest = context.say, context.subject.manifest
    if manifest is None or manifest.ranges is None:
        return None
    measured = manifest.ranges
    told = [say("ranges.told", seeds=len(measured.seeds), margin=f"{measured.margin:g}")]
    told += [say("ranges.given", images=measured.images)] if measured.images else []
    kept = say("ranges.kept", modules=say.join(manifest.keep_fp32)) if manifest.keep_fp32 else say("ranges.none kept")
    table = _table(context, manifest, measured)
    return context.section("ranges", *(paragraph(text) for text in (*told, kept)), table)


def _table(context: Context, manifest: Manifest, measured: Ranges) -> Table:
    """The modules with the least headroom, in the order in which they run."""
    say, count = context.say, len(measured.modules)
    lowest = sorted(measured.modules, key=lambda module: module.headroom)[:SHOWN]
    caption = say("table.ranges") if count <= SHOWN else say("table.ranges.lowest", shown=SHOWN, count=count)
    heads = columns(
        [say("column.range module"), say("column.type"), say("column.largest by")],
        [say("column.largest"), say("column.headroom"), say("column.smallest rms")],
    )
    rows = tuple(_row(context, manifest, module) for module in measured.modules if module in lowest)
    return Table(caption, heads, rows, context.export_command)


def _row(context: Context, manifest: Manifest, measured: ModuleRange) -> tuple[Text, ...]:
    say, smallest = context.say, measured.smallest
    return (
        Text(measured.module, "code") if measured.module else Text(say("ranges.outside")),
        Text("float32" if measured.module in manifest.keep_fp32 else "float16", "code"),
        Text(measured.largest.operator, "quoted"),
        number(spell_magnitude(measured.largest.value)),
        number(spell_magnitude(measured.headroom)),
        absent(say) if smallest is None else number(spell_error(smallest.value)),
    )
