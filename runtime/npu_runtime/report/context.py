"""What every section of one artifact is written with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from npu_runtime.bench.records import BenchRecord
from npu_runtime.parity.baselines import STORED
from npu_runtime.parity.records import ParityRecord, Step
from npu_runtime.report.commands import bench_command, export_command, parity_command
from npu_runtime.report.document import Block, Column, Command, Section, Table, Text
from npu_runtime.report.messages import Say
from npu_runtime.report.subjects import Subject

EXPORT = "export"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A record under the name that the report has for it."""

    label: str
    """Unique among the artifact's."""
    path: str
    record: ParityRecord | BenchRecord
    command: int
    anchor: str


@dataclass(frozen=True, slots=True)
class Context:
    say: Say
    subject: Subject
    anchor: str
    """Before the names of everything in the artifact's part of the page."""
    records: tuple[Labelled, ...]
    commands: tuple[Command, ...]

    @property
    def export_command(self) -> int | None:
        """None where the manifest, which tells how the artifact was exported, was not given."""
        return None if self.subject.manifest is None else self.commands[0].number

    def parities(self) -> list[tuple[Labelled, ParityRecord]]:
        return [(given, given.record) for given in self.records if isinstance(given.record, ParityRecord)]

    def benches(self) -> list[tuple[Labelled, BenchRecord]]:
        return [(given, given.record) for given in self.records if isinstance(given.record, BenchRecord)]

    def section(self, name: str, *blocks: Block) -> Section:
        """A section whose title is the message `section.NAME`."""
        return Section(self.say(f"section.{name}"), f"{self.anchor}-{name.replace(' ', '-')}", blocks)

    def facts(self, caption: str, pairs: Iterable[tuple[str, Text]], command: int | None = None) -> Table:
        """A table of two columns: what, and what it is."""
        heads = (Column(self.say("column.item")), Column(self.say("column.fact")))
        return Table(caption, heads, tuple((Text(name), value) for name, value in pairs), command)

    def title(self, step: Step) -> str:
        return self.session(step.backend, step.precision, step.device)

    def session(self, backend: str, precision: str, device: str) -> str:
        return self.say("session", backend=backend, precision=precision, device=device)

    def with_batch(self, step: Step) -> str:
        """Its title and the batch sizes that were run, where any was."""
        if not step.batches:
            return self.title(step)
        return self.say("step.batch", session=self.title(step), batch=self.say.join(step.batches))

    def baseline(self, record: ParityRecord, step: Step) -> str:
        """What a step was compared with, in the report's language."""
        if step.baseline == STORED:
            return self.say("stored reference")
        titles = {other.title: self.title(other) for other in record.steps}
        return titles.get(step.baseline, step.baseline)


def make_context(say: Say, subject: Subject, anchor: str, first_command: int) -> Context:
    """The context of one artifact, its commands numbered from `first_command`."""
    commands: list[Command] = []
    if subject.manifest is not None:
        line = export_command(subject.manifest, subject.path)
        commands.append(Command(first_command, say("command.export"), line))
    labels = _labels(say, subject)
    records = []
    for index, (given, label) in enumerate(zip(subject.records, labels)):
        record = given.record
        line = parity_command(record) if isinstance(record, ParityRecord) else bench_command(record)
        commands.append(Command(first_command + len(commands), say("command.run", label=label), line))
        records.append(Labelled(label, given.path, record, commands[-1].number, f"{anchor}-r{index + 1}"))
    return Context(say, subject, anchor, tuple(records), tuple(commands))


def _labels(say: Say, subject: Subject) -> Sequence[str]:
    """`parity on npu:0`, and a number behind it where several records would have one name."""
    names = [
        say(
            "record.label",
            kind=say(f"kind.{given.record.command if isinstance(given.record, ParityRecord) else 'bench'}"),
            device=given.record.device,
        )
        for given in subject.records
    ]
    counts: Mapping[str, int] = Counter(names)
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if counts[name] == 1 else say("record.numbered", name=name, number=seen[name]))
    return labels
