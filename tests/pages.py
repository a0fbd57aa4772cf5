"""An HTML page and a Markdown file taken apart, for tests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = ("meta", "link", "img", "br")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, *tags: str) -> list[Element]:
        """Every element below of these tags, in order."""
        return [e for child in self.children for e in ([child] if child.tag in tags else []) + child.all(*tags)]


class Page(HTMLParser):
    """The elements of a page, whose tags must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(html)
        self.close()
        assert self._open == [self.root], f"not closed: {[element.tag for element in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, f"</{tag}> ends another element"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, *tags: str) -> list[Element]:
        return self.root.all(*tags)

    def elements(self) -> list[Element]:
        """Every element."""
        return _below(self.root)

    @property
    def words(self) -> str:
        """The text of the body, white space as one space."""
        return " ".join(self.root.all("body")[0].text.split())


def _below(element: Element) -> list[Element]:
    return [found for child in element.children for found in (child, *_below(child))]


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, row by row with its heads; escaped pipes are no borders."""
    tables: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        before = line
    return tables
