"""What every record was measured on, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from npu_runtime.backends.base import SessionReport
from npu_runtime.bench.records import BenchRecord
from npu_runtime.report.context import Context, Labelled
from npu_runtime.report.document import Column, Section, Table, Text, paragraph
from npu_runtime.report.spell import absent, spell_error

HOST = ("host", "processor", "machine", "cores_usable", "system", "load_average_1min")
"""Fields of a record's environment that are one value, in the order of the report."""


def environment(context: Context) -> Section:
    say, manifest = context.say, context.subject.manifest
    described = {given.label: dict(_describe(context, given)) for given in context.records}
    if manifest is not None:
        versions: dict[str, object] = {
            f"version.{name}": version for name, version in manifest.provenance.versions.items()
        }
        described = {say("kind.export"): versions, **described}
    if not described:
        return context.section("environment", paragraph(absent(say, "not recorded")))
    heads = (Column(say("column.item")), *(Column(label) for label in described))
    names = list(dict.fromkeys(name for values in described.values() for name in values))
    names.sort(key=lambda name: name.startswith(("version.", "variable.")))
    rows = []
    for name in names:
        kind, _, package = name.partition(".")
        head = package if kind == "version" else package if kind == "variable" else say(f"environment.{name}")
        cells = [
            Text(str(values[name]), "code" if kind in ("version", "variable", "path") else "plain")
            if values.get(name) not in (None, "")
            else absent(say, "not recorded")
            for values in described.values()
        ]
        rows.append((Text(head), *cells))
    return context.section(
        "environment", paragraph(say("environment.told")), Table(say("table.environment"), heads, tuple(rows))
    )


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
    if isinstance(record, BenchRecord):
        yield "threads", record.threads
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
    for kind, field in (("version", "versions"), ("variable", "variables")):
        values = record.environment.get(field)
        if isinstance(values, Mapping):
            for name, value in values.items():
                yield f"{kind}.{name}", value


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
    measured = [asdict(report.arithmetic) for report in conditions.values() if report.arithmetic is not None]
    largest = {
        name: max(errors[name] for errors in measured if errors[name] is not None)
        for name in (measured[0] if measured else ())
        if any(errors[name] is not None for errors in measured)
    }
    return ", ".join(f"{name} {spell_error(error)}" for name, error in largest.items())
