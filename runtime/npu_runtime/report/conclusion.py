"""What the records allow to say, and what has to be known beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from npu_runtime.backends.base import SessionReport
from npu_runtime.backends.table import EAGER
from npu_runtime.bench.records import BenchRecord
from npu_runtime.devices import parse_device
from npu_runtime.parity.metrics import Check
from npu_runtime.parity.records import ParityRecord
from npu_runtime.report.context import Context, Labelled
from npu_runtime.report.document import Bullets, Section, Table, Text, columns
from npu_runtime.report.messages import Say
from npu_runtime.report.performance import fastest
from npu_runtime.report.spell import absent, spell_check, spell_cosine, spell_ms, spell_speedup

Item = tuple[Text, ...]


def summary(contexts: Sequence[Context], say: Say) -> Section:
    """One row for each artifact."""
    heads = columns([say(f"column.{name}") for name in ("encoder", "weights", "parity", "nearest", "speed")])
    rows = tuple(
        (
            Text(f"{context.subject.encoder} {context.subject.precision}", "code"),
            _weights(context),
            _parity_cell(context),
            _nearest_cell(context),
            _speed_cell(context),
        )
        for context in contexts
    )
    return Section(say("section.summary"), "summary", (Table(say("table.summary"), heads, rows),))


def _weights(context: Context) -> Text:
    weights, say = context.subject.weights, context.say
    if weights.random_seed is not None:
        return Text(say("random weights short", seed=weights.random_seed), "warn")
    return Text(weights.source, "code")


def _parity_cell(context: Context) -> Text:
    say, parities = context.say, context.parities()
    if not parities:
        return absent(say)
    told = say.join(
        say("parity.on", verdict=say(f"parity.{_outcome(record)}"), device=record.device) for _, record in parities
    )
    outcomes = {_outcome(record) for _, record in parities}
    return Text(told, "pass" if outcomes == {"passed"} else "fail" if "failed" in outcomes else "warn")


def _outcome(record: ParityRecord) -> str:
    if record.first_failure is not None:
        return "failed"
    return "passed" if record.passed else "undecided"


def _nearest_cell(context: Context) -> Text:
    checks = [check for _, record in context.parities() for check in _checks(record)]
    nearest = max(checks, key=_share, default=None)
    if nearest is None:
        return absent(context.say)
    return Text(spell_check(context.say, nearest))


def _checks(record: ParityRecord) -> list[Check]:
    return [check for step in record.steps for check in step.checks]


def _share(check: Check) -> float:
    """How much of its limit a value takes; NaN takes all."""
    if check.value != check.value or check.limit == 0:
        return float("inf") if check.value != 0 else 0.0
    return check.value / check.limit


def _speed_cell(context: Context) -> Text:
    say = context.say
    rows = [row for _, record in context.benches() if (row := fastest(record)) is not None]
    if not rows:
        return absent(say)
    row = rows[0]
    told = say("speed", backend=row.backend, batch=row.batch, median=spell_ms(row.latency.median_ms))
    if row.over_eager is None:
        return Text(told)
    speedup = say(
        "speed.over eager", speedup=spell_speedup(say, row.over_eager), verdict=_verdict(say, row.over_eager.verdict)
    )
    return Text(told + speedup)


def _verdict(say: Say, verdict: str) -> str:
    return say(f"verdict.{verdict}")


def notes(context: Context) -> Section:
    return context.section("notes", Bullets(tuple(_notes(context))))


def _notes(context: Context) -> Iterator[Item]:
    say, weights = context.say, context.subject.weights
    if weights.random_seed is not None:
        yield (Text(say("random weights", seed=weights.random_seed), "warn"),)
    if not any(_ran_on_npu(given.record) for given in context.records):
        yield (Text(say("note.no ascend"), "warn"),)
    if context.subject.manifest is None:
        yield (absent(say, "note.no manifest"),)
    for given in context.records:
        record = given.record
        if record.partial:
            yield (Text(say("note.partial", label=given.label), "warn"),)
        yield from (
            _parity_notes(context, given, record)
            if isinstance(record, ParityRecord)
            else _bench_notes(context, given, record)
        )
    yield from _tolerances(context)


def _ran_on_npu(record: ParityRecord | BenchRecord) -> bool:
    if parse_device(record.device).kind != "npu":
        return False
    if isinstance(record, BenchRecord):
        return bool(record.rows or record.throughput)
    return any(step.device == record.device and step.outputs for step in record.steps)


def _parity_notes(context: Context, given: Labelled, record: ParityRecord) -> Iterator[Item]:
    say = context.say
    for step in record.steps:
        if step.status == "not run":
            told = say("note.step not run", label=given.label, session=context.title(step))
            yield Text(told, "absent"), Text(step.reason or "", "quoted")
        if step.conditions is not None:
            yield from _fallback_note(say, context.title(step), step.conditions)
    for skipped in record.skipped:
        yield Text(say("note.skipped", label=given.label)), Text(skipped.name, "code"), Text(skipped.reason, "quoted")
    given_limits = {(t.output, t.metric): t for t in record.overridden}
    for limit in given_limits.values():
        name = f"{limit.output}.{limit.metric}"
        yield (Text(say("note.overridden", label=given.label, name=name, limit=f"{limit.limit:g}"), "warn"),)


def _bench_notes(context: Context, given: Labelled, record: BenchRecord) -> Iterator[Item]:
    say = context.say
    noisy = [
        say("noisy row", backend=row.backend, batch=row.batch, share=f"{100 * spread:.0f}")
        for row in record.rows
        if row.latency.noisy
        for spread in (row.latency.interquartile_range_ms / row.latency.median_ms,)
    ]
    if noisy:
        yield (Text(say("note.noisy", label=given.label, rows=say.join(noisy)), "warn"),)
    for name, reason in record.not_run.items():
        yield Text(say("note.step not run", label=given.label, session=name), "absent"), Text(reason, "quoted")
    for name, report in record.conditions.items():
        yield from _fallback_note(say, name, report)


def _fallback_note(say: Say, session: str, report: SessionReport) -> Iterator[Item]:
    if report.fallback is None:
        yield (Text(say("note.fallback unknown", session=session), "warn"),)
    elif report.fallback:
        yield (Text(say("note.fallback", session=session, operators=", ".join(report.fallback)), "warn"),)


def _tolerances(context: Context) -> Iterator[Item]:
    """On what the limits rest, each basis once for the kinds of device and the metrics that it is for."""
    say, manifest = context.say, context.subject.manifest
    tolerances = [t for _, record in context.parities() for t in record.tolerances]
    tolerances += [] if manifest is None else manifest.tolerances_on("cpu")
    bases: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for tolerance in tolerances:
        fast = tolerance.numerics == "fast"
        name = say("device.fast", device=tolerance.device) if fast else tolerance.device
        devices, metrics = bases.setdefault(tolerance.basis, ({}, {}))
        devices[name] = metrics[say(f"metric.{tolerance.metric}")] = None
    for basis, (devices, metrics) in bases.items():
        yield Text(say("note.basis", devices=say.join(devices), metrics=say.join(metrics))), Text(basis, "quoted")


def conclusion(context: Context) -> Section:
    say = context.say
    items: list[Item] = []
    for given, record in context.parities():
        items += _parity_conclusion(context, given, record)
    if not context.parities():
        items.append((absent(say, "conclusion.no parity"),))
    for given, bench in context.benches():
        items += _bench_conclusion(context, given, bench)
    if not context.benches():
        items.append((absent(say, "conclusion.no bench"),))
    if context.subject.weights.random_seed is not None:
        items.append((Text(say("conclusion.random"), "warn"),))
    if not any(_ran_on_npu(given.record) for given in context.records):
        items.append((Text(say("conclusion.no ascend"), "warn"),))
    return context.section("conclusion", Bullets(tuple(items)))


def _parity_conclusion(context: Context, given: Labelled, record: ParityRecord) -> Iterator[Item]:
    say, checks = context.say, _checks(record)
    failed = next((step for step in record.steps if step.status == "failed"), None)
    if failed is not None:
        told = say(
            "conclusion.failed", label=given.label, session=context.title(failed), cause=say(f"cause.{failed.cause}")
        )
        beyond = [spell_check(say, check) for check in failed.checks if not check.passed]
        reason = Text(say.join(beyond)) if beyond else Text(failed.reason or "", "quoted")
        yield Text(told, "fail"), reason
    elif record.passed:
        told = say("conclusion.passed", label=given.label, device=record.device, checks=len(checks))
        nearest = max(checks, key=_share)
        yield Text(told, "pass"), Text(say("conclusion.nearest", check=spell_check(say, nearest)))
    else:
        yield (Text(say("conclusion.undecided", label=given.label, device=record.device), "warn"),)
    if record.partial:
        yield (Text(say("note.partial", label=given.label), "warn"),)
    cosines = [o.metrics.min_cosine for s in record.steps for o in s.whole_outputs if s.device == record.device]
    if cosines:
        yield (Text(say("conclusion.cosine", label=given.label, cosine=spell_cosine(min(cosines)))),)


def _bench_conclusion(context: Context, given: Labelled, record: BenchRecord) -> Iterator[Item]:
    say = context.say
    for row in record.rows:
        if row.backend == EAGER:
            continue
        median = spell_ms(row.latency.median_ms)
        told = say("conclusion.latency", label=given.label, backend=row.backend, batch=row.batch, median=median)
        if row.over_eager is None:
            yield (Text(told),)
            continue
        judged = row.over_eager
        tones = {"faster": "pass", "slower": "fail", "same": "plain", "undecided": "warn"}
        verdict = Text(_verdict(say, judged.verdict), tones[judged.verdict])  # type: ignore[arg-type]
        yield Text(told), Text(say("conclusion.speedup", speedup=spell_speedup(say, judged))), verdict
