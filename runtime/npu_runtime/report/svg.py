"""matplotlib's figures as SVG elements whose colours and fonts are the page's: one serves light, dark and print."""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"

INK, FAINT, LIMIT, PAPER = "#010203", "#020304", "#030405", "#040506"
SERIES = ("#050601", "#050602", "#050603", "#050604", "#050605", "#050606")
COLOURS = {
    INK: "var(--ink-soft)",
    FAINT: "var(--line)",
    LIMIT: "var(--fail)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES, 1)},
}
"""Colours that stand in the drawing for the page's own."""
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
"""By series, beside its colour."""

WIDTH = 5.0
"""Inches of 72 units: as wide as a phone, so that text is not made smaller there."""
FONT_SIZE = 9.0


@dataclass(slots=True)
class Words:
    """Words of a drawing. matplotlib measures and lays out stand-ins of their width, in letters that its own font has,
    and reads no formula in a name."""

    put: dict[str, str] = field(default_factory=dict)

    def __call__(self, text: str, most: int = 60) -> str:
        """The stand-in of a text, which is cut where it is longer than `most` letters."""
        text = " ".join(text.split())
        text = text if len(text) <= most else f"{text[: most - 1]}…"
        width = sum(1.6 if unicodedata.east_asian_width(letter) in "WF" else 0.95 for letter in text)
        standin = f"q{len(self.put)}q".ljust(round(width), "n")
        self.put[standin] = text
        return standin


def draw(identifier: str, height: float, paint: Callable[[Axes, Words], None]) -> str:
    """One `svg` element, `identifier` at the start of every id in it, of what `paint` draws into `height` inches."""
    words = Words()
    with _own_style(identifier):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        paint(axes, words)
        return _clean(_save(figure), identifier, words)


@contextlib.contextmanager
def _own_style(salt: str) -> Iterator[None]:
    """matplotlib's defaults, whatever the machine's matplotlibrc says, and the report's style on them."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": salt,
                "font.size": FONT_SIZE,
                "axes.unicode_minus": False,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.edgecolor": INK,
                "axes.labelcolor": INK,
                "axes.facecolor": "none",
                "figure.facecolor": "none",
                "text.color": INK,
                "xtick.color": INK,
                "ytick.color": INK,
                "grid.color": FAINT,
                "grid.linewidth": 0.6,
                "hatch.linewidth": 0.7,
                "axes.linewidth": 0.7,
                "legend.frameon": False,
            }
        )
        yield


def _save(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return data.getvalue()


def _clean(data: bytes, identifier: str, words: Words) -> str:
    """The drawing without prolog, metadata and sizes, its ids, colours and fonts the page's."""
    root = ElementTree.fromstring(data)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{identifier}-{element.attrib['id']}")
        for name, value in list(element.attrib.items()):
            if name in (f"{{{XLINK}}}href", "href") and value.startswith("#"):
                del element.attrib[name]
                element.set("href", f"#{identifier}-{value[1:]}")
                continue
            element.set(name, _restyle(value, identifier))
        if element.text is not None and element.text.strip() in words.put:
            element.text = words.put[element.text.strip()]
    for parent in root.iter(f"{{{SVG}}}defs"):
        for style in parent.findall(f"{{{SVG}}}style"):
            parent.remove(style)  # it would be one for every element of the page
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(value: str, identifier: str) -> str:
    value = value.replace("url(#", f"url(#{identifier}-")
    value = re.sub(r"font: ([0-9.]+px) [^;]*", r"font-size: \1", value)
    value = re.sub(r"font-family: [^;]*;? ?", "", value)
    return re.sub(r"#[0-9a-f]{6}", lambda found: COLOURS.get(found[0], found[0]), value)
