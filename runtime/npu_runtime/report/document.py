"""What a report says, apart from how it is written: the HTML page and the Markdown hold the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Tone = Literal["plain", "number", "code", "quoted", "pass", "fail", "warn", "absent"]
"""quoted: English as a record has it, whatever the report's language. absent: not measured, not recorded."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text; a table's cell is one."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Paragraph:
    parts: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list, each item of one or more pieces."""

    items: tuple[tuple[Text, ...], ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; numbers stand to the right."""

    title: str
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Text, ...], ...]
    command: int | None = None
    """Number of the command that reproduces it; None where its figures are not those of a run."""
    grouped: int = 0
    """Leading columns whose equal cells in a row below each other are one on the page."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"rows of {self.caption!r} have other lengths than its {len(self.columns)} columns")

    def placed(self) -> list[list[tuple[Column, Text, int]]]:
        """The cells of each row with their columns and the rows that they reach down, grouped ones once."""
        found = [[1] * len(self.columns) for _ in self.rows]
        for index in range(len(self.rows) - 1, 0, -1):
            for column in range(self.grouped):
                if self.rows[index][: column + 1] != self.rows[index - 1][: column + 1]:
                    break
                found[index - 1][column] += found[index][column]
                found[index][column] = 0
        return [
            [placed for placed in zip(self.columns, row, spans) if placed[2]] for row, spans in zip(self.rows, found)
        ]


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot, in the page alone; a table beside it holds its numbers."""

    svg: str
    """One `svg` element whose ids no other figure has."""
    description: str
    """What it shows, for who cannot see it."""
    caption: str
    command: int | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """One image that was run: as published, and as the network is given it; in the page alone."""

    name: str
    published: str
    """JPEG in base64, as `preprocessed`."""
    preprocessed: str
    published_description: str
    preprocessed_description: str
    figures: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Pictures:
    caption: str
    published_title: str
    preprocessed_title: str
    pictures: tuple[Picture, ...]
    command: int | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that gives what the record holds."""

    number: int
    gives: str
    line: str


@dataclass(frozen=True, slots=True)
class Commands:
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to be copied."""

    text: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is under it."""

    title: str
    anchor: str
    """Unique in the report."""
    blocks: tuple[Block, ...]


Block: TypeAlias = "Paragraph | Bullets | Table | Figure | Pictures | Commands | Code | Section"


@dataclass(frozen=True, slots=True)
class Report:
    language: str
    """As `lang` of HTML spells it."""
    title: str
    lead: tuple[Text, ...]
    """Under the title: what the report is made of."""
    sections: tuple[Section, ...]


def paragraph(*parts: Text | str) -> Paragraph:
    return Paragraph(tuple(Text(part) if isinstance(part, str) else part for part in parts))


def columns(names: Iterable[str], numeric: Iterable[str] = ()) -> tuple[Column, ...]:
    """Columns that are text, then columns of numbers."""
    return (*(Column(name) for name in names), *(Column(name, True) for name in numeric))


def walk(blocks: Sequence[Block]) -> Iterator[Block]:
    """Every block, sections before what they hold."""
    for block in blocks:
        yield block
        if isinstance(block, Section):
            yield from walk(block.blocks)
