"""What every record was measured on, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from npu_runtime.backends.base import SessionReport
from npu_runtime.bench.records import BenchRecord
from npu_runtime.report.context import Context, Labelled
from npu_runtime.report.document import Column, Section, Table, Text, Tone, paragraph
from npu_runtime.report.spell import absent, spell_error

HOST = ("host", "processor", "machine", "cores_usable", "system", "load_average_1min")
"""Fields of a record's environment that are one value, in the order of the report."""


def environment(context: Context) -> Section:
    say, manifest = context.say, context.subject.manifest
    machines: dict[str, Mapping[str, object]] = {
        given.label: dict(_describe(context, given)) for given in context.records
    }
    versions = {given.label: _mapping(given.record.environment.get("versions")) for given in context.records}
    variables = {given.label: _mapping(given.record.environment.get("variables")) for given in context.records}
    if manifest is not None:
        versions = {say("kind.export"): manifest.provenance.versions, **versions}
    tables = [
        _side_by_side(context, say("table.environment"), machines, lambda name: say(f"environment.{name}"), "plain"),
        _side_by_side(context, say("table.versions"), versions, str, "code"),
        _side_by_side(context, say("table.variables"), variables, str, "code"),
    ]
    found = [table for table in tables if table is not None]
    told = paragraph(say("environment.told") if found else absent(say, "not recorded"))
    return context.section("environment", told, *found)


def _side_by_side(
    context: Context, caption: str, values: Mapping[str, Mapping[str, object]], head: Callable[[str], str], tone: Tone
) -> Table | None:
    """A column for each record, a row for each name that any of them has; None where none has one."""
    say, names = context.say, list(dict.fromkeys(name for found in values.values() for name in found))
    if not names:
        return None
    rows = [
        (
            Text(head(name)),
            *(
                absent(say, "not recorded") if found.get(name) in (None, "") else Text(str(found[name]), tone)
                for found in values.values()
            ),
        )
        for name in names
    ]
    return Table(caption, (Column(say("column.item")), *(Column(label) for label in values)), tuple(rows))


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _describe(context: Context, given: Labelled) -> Iterator[tuple[str, object]]:
    """What a record says of its surroundings, by the name of its row."""
    say, record = context.say, given.record
    yield "path", given.path
    yield "device", record.device
    if record.accelerator is not None:
        yield "accelerator", record.accelerator.name
        yield "software", record.accelerator.software
    for name in HOST:
        value = record.environment.get(name)
        yield name, f"{value:.2f}" if isinstance(value, float) else value
    yield "threads", record.threads
    if isinstance(record, BenchRecord):
        conditions = dict(record.conditions)
    else:
        conditions = {step.title: step.conditions for step in record.steps if step.conditions is not None}
    yield "numerics", say.join(dict.fromkeys(str(c.numerics.get("numerics")) for c in conditions.values()))
    yield "settings", _settings(conditions)
    errors = _arithmetic(conditions)
    if errors:
        yield "arithmetic", errors
    graphs = [
        say("graph.replayed" if graph.replayed else "graph.plain", backend=name, batch=graph.batch)
        for name, report in conditions.items()
        for graph in report.graphs
    ]
    if graphs:
        yield "graphs", say.join(graphs)


def _settings(conditions: Mapping[str, SessionReport]) -> str:
    """Settings of the libraries, each once."""
    found = [
        f"{name.removeprefix('torch.backends.')} = {value}"
        for report in conditions.values()
        for name, value in report.numerics.items()
        if name != "numerics"
    ]
    return "; ".join(dict.fromkeys(found))


def _arithmetic(conditions: Mapping[str, SessionReport]) -> str:
    """Errors of the device's operators against float64, as they were measured when programs were loaded."""
    largest: dict[str, float] = {}
    for report in conditions.values():
        for kind, error in () if report.arithmetic is None else report.arithmetic.errors().items():
            largest[kind] = max(error, largest.get(kind, error))
    return ", ".join(f"{name} {spell_error(error)}" for name, error in largest.items())
