"""What one look gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail", "absent"]
"""warn: it runs, but not as it should. fail: something that is installed, set or asked for cannot work. absent: it is
not here, and nothing that is here needs it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str
    advice: str | None = None
    """What to do; None where there is nothing to do."""


@dataclass(frozen=True, slots=True)
class VariableCheck(Check):
    """An environment variable; `found` is its value here, or `unset`."""

    does: str = ""
    advised: str = ""


def release(version: str) -> tuple[int, ...]:
    """`(2, 9, 0)` of `2.9.0.post1+git…`: the numbers that say how old it is."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
