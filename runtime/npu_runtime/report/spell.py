"""Figures as people read them."""

from __future__ import annotations

import math

from npu_runtime.bench.statistics import Comparison
from npu_runtime.parity.metrics import Check
from npu_runtime.parity.records import OutputParity
from npu_runtime.report.document import Text
from npu_runtime.report.messages import Say


def number(text: str) -> Text:
    return Text(text, "number")


def spell_error(value: float) -> str:
    """An error in two digits after the first: `3.10e-06`, 0 as such."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return "0" if value == 0 else f"{value:.2e}"


def spell_optional(value: float | None) -> str:
    """An error, a dash where the record has none."""
    return "–" if value is None else spell_error(value)


def spell_limit(value: float) -> str:
    return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}" if _is_round(value) else f"{value:.2e}"


def _is_round(value: float) -> bool:
    return math.isclose(float(f"{value:.0e}"), value)


def spell_share(value: float) -> str:
    """A cosine or an agreement."""
    return f"{value:.4g}" if math.isfinite(value) else spell_error(value)


def spell_cosine(value: float) -> str:
    """With as many digits as float32's precision bears; nearer to 1, as its distance from it."""
    if not math.isfinite(value):
        return spell_error(value)
    return f"1 − {1 - value:.1e}" if 0 < 1 - value < 1e-6 else f"{value:.8g}"


def spell_ms(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.1f}"


def spell_rate(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.1f}"


def spell_size(nbytes: int) -> str:
    """In units of 1000 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.2f} {name}"
    return f"{nbytes} B"


def spell_check(say: Say, check: Check) -> str:
    """`tokens max abs error 3.1e-06, limit 5e-05`."""
    return say(
        "check",
        output=name_part(say, check),
        metric=say(f"metric.{check.metric}"),
        value=spell_error(check.value),
        limit=spell_limit(check.limit),
    )


def name_part(say: Say, part: Check | OutputParity) -> str:
    """`tokens`, or `tokens (CLS)` for a kind of them."""
    return part.output if part.group is None else f"{part.output} ({say(f'group.{part.group}')})"


def spell_speedup(say: Say, comparison: Comparison) -> str:
    """`2.27 × [2.20, 2.31]`."""
    interval, speedup = comparison.interval, f"{comparison.speedup:.2f}"
    if interval is None:
        return say("speedup", speedup=speedup)
    return say("speedup.interval", speedup=speedup, low=f"{interval.low:.2f}", high=f"{interval.high:.2f}")


def verdict(say: Say, passed: bool) -> Text:
    return Text(say("verdict.pass"), "pass") if passed else Text(say("verdict.fail"), "fail")


def absent(say: Say, key: str = "not measured") -> Text:
    return Text(say(key), "absent")
