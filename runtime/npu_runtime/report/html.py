"""A report as one HTML page that needs neither a network nor another file."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

from npu_runtime.report.document import Report, Section, walk
from npu_runtime.report.messages import Say

if TYPE_CHECKING:
    from markupsafe import Markup

EXPONENT = re.compile(r"\d(?:\.\d+)?e-\d+")


def write_html(report: Report, say: Say) -> str:
    """The page. Raises ModuleNotFoundError where jinja2 is not installed."""
    from jinja2 import Environment, StrictUndefined

    folder = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["keep_numbers"] = _keep_numbers
    environment.tests["section"] = lambda block: isinstance(block, Section)
    template = environment.from_string((folder / "page.html.j2").read_text("utf-8"))
    kinds = {id(block): type(block).__name__ for block in walk(report.sections)}
    style = (folder / "page.css").read_text("utf-8")
    return template.render(report=report, say=say, style=style, kind=lambda block: kinds[id(block)])


def _keep_numbers(text: str) -> Markup:
    """The text, escaped, whose lines do not break at the hyphen of an exponent."""
    from markupsafe import Markup, escape  # which jinja2 brings

    return Markup(EXPONENT.sub(r'<span class="number">\g<0></span>', str(escape(text))))
