"""The report of some artifacts, section by section."""

from __future__ import annotations

from collections.abc import Sequence

from npu_runtime.report.accuracy import accuracy
from npu_runtime.report.conclusion import conclusion, notes, summary
from npu_runtime.report.context import Context, make_context
from npu_runtime.report.document import Report, Section, Text
from npu_runtime.report.environments import environment
from npu_runtime.report.evidence import evidence
from npu_runtime.report.introduction import files, introduction, quick_start
from npu_runtime.report.messages import TAGS, Say
from npu_runtime.report.performance import performance
from npu_runtime.report.ranges import ranges
from npu_runtime.report.subjects import Subject

SECTIONS = (
    introduction,
    environment,
    quick_start,
    evidence,
    ranges,
    accuracy,
    performance,
    files,
    notes,
    conclusion,
)
"""In the order of the report. A section that an artifact has nothing for may be None."""


def compose(subjects: Sequence[Subject], language: str) -> Report:
    """The report of at least one artifact: a summary of all, then the sections of each."""
    say = Say(language)
    contexts: list[Context] = []
    for index, subject in enumerate(subjects):
        first = 1 + sum(len(context.commands) for context in contexts)
        contexts.append(make_context(say, subject, f"e{index + 1}", first))
    sections = [summary(contexts, say)]
    if len(contexts) == 1:
        sections += _sections(contexts[0])
        title = say("title.one", encoder=subjects[0].encoder, precision=subjects[0].precision)
    else:
        names = [f"{subject.encoder} {subject.precision}" for subject in subjects]
        sections += [
            Section(_unique(names, index, subjects), context.anchor, _sections(context))
            for index, context in enumerate(contexts)
        ]
        title = say("title.many", count=len(contexts))
    lead = [Text(say("lead", records=sum(len(s.records) + (s.manifest is not None) for s in subjects)))]
    if any(subject.weights.random_seed is not None for subject in subjects):
        lead.append(Text(say("lead.random"), "warn"))
    return Report(TAGS[language], title, tuple(lead), tuple(sections))


def _sections(context: Context) -> tuple[Section, ...]:
    return tuple(section for make in SECTIONS if (section := make(context)) is not None)


def _unique(names: Sequence[str], index: int, subjects: Sequence[Subject]) -> str:
    """A name, and the artifact's digest behind it where two artifacts have one name."""
    name = names[index]
    return name if names.count(name) == 1 else f"{name} ({subjects[index].digest[:8]})"
