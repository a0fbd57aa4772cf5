"""A report as Markdown: its text and tables. The plots and pictures are on the page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from npu_runtime.report.document import (
    Block,
    Bullets,
    Code,
    Commands,
    Figure,
    Paragraph,
    Pictures,
    Report,
    Section,
    Table,
    Text,
)
from npu_runtime.report.messages import Say


def write_markdown(report: Report, say: Say) -> str:
    """GitHub's Markdown."""
    lines = [f"# {_escape(report.title)}", "", _line(report.lead), "", _escape(say("markdown.plots")), ""]
    for section in report.sections:
        lines += _section(section, 2, say)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section, level: int, say: Say) -> Iterator[str]:
    yield f"{'#' * min(level, 6)} {_escape(section.title)}"
    yield ""
    for block in section.blocks:
        if isinstance(block, Section):
            yield from _section(block, level + 1, say)
            continue
        lines = list(_block(block, say))
        yield from [*lines, ""] if lines else []


def _block(block: Block, say: Say) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield _line(block.parts)
    elif isinstance(block, Bullets):
        yield from (f"- {_line(item)}" for item in block.items)
    elif isinstance(block, Table):
        yield from _table(block, say)
    elif isinstance(block, Commands):
        for command in block.commands:
            yield f"{_escape(say('command.numbered', number=command.number))} {_escape(command.gives)}"
            yield ""
            yield from _fence(command.line, "sh")
            yield ""
    elif isinstance(block, Code):
        yield _escape(block.caption)
        yield ""
        yield from _fence(block.text, "python")
    elif isinstance(block, Pictures):
        yield from _pictures(block, say)
    elif not isinstance(block, Figure):
        raise TypeError(f"no Markdown for {type(block).__name__}")


def _table(table: Table, say: Say) -> Iterator[str]:
    yield f"**{_escape(table.caption)}**{_reference(table.command, say)}"
    yield ""
    yield _row(_escape(column.title) for column in table.columns)
    yield _row("---:" if column.numeric else "---" for column in table.columns)
    for row in table.rows:
        yield _row(map(_text, row))


def _pictures(pictures: Pictures, say: Say) -> Iterator[str]:
    yield f"**{_escape(pictures.caption)}**{_reference(pictures.command, say)}"
    yield ""
    for picture in pictures.pictures:
        yield f"- {_code(picture.name)}: {say.join(map(_text, picture.figures))}"


def _reference(command: int | None, say: Say) -> str:
    return "" if command is None else f" ({_escape(say('command.reference', number=command))})"


def _row(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _line(parts: Sequence[Text]) -> str:
    return " ".join(map(_text, parts))


def _text(text: Text) -> str:
    if text.tone == "code":
        return _code(text.text)
    escaped = _escape(text.text)
    return f"**{escaped}**" if text.tone in ("pass", "fail", "warn") and escaped else escaped


def _escape(text: str) -> str:
    """Text in which nothing is markup, in one line."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    """A span of code, one backtick more around it than it holds in a row; a pipe would end a table's cell."""
    text = " ".join(text.split()).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padded = f" {text} " if "`" in text else text
    return f"{ticks}{padded}{ticks}" if text else ""


def _fence(text: str, language: str) -> list[str]:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{ticks}{language}", *text.splitlines(), ticks]
