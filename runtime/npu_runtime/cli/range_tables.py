"""Ranges of a network against float16's as a table, for plans and artifacts."""

from __future__ import annotations

from collections.abc import Sequence

from npu_runtime.artifact.range_text import spell_magnitude, spell_module
from npu_runtime.artifact.schema import Ranges
from npu_runtime.cli.console import print_table


def print_ranges(ranges: Ranges, kept: Sequence[str]) -> None:
    """Every module: what is largest and smallest in it, and whether it stays float32."""
    print_table(
        "ranges, headroom to 65,504",
        ("module", "type", "largest by", "smallest by", "largest", "headroom", "smallest rms"),
        [
            (
                spell_module(measured.module),
                "float32" if measured.module in kept else "float16",
                measured.largest.operator,
                "-" if measured.smallest is None else measured.smallest.operator,
                spell_magnitude(measured.largest.value),
                spell_magnitude(measured.headroom),
                "-" if measured.smallest is None else f"{measured.smallest.value:.1e}",
            )
            for measured in ranges.modules
        ],
        left=4,
    )
