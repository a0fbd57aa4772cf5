"""Ranges as people read them, on one line."""

from __future__ import annotations

from npu_runtime.artifact.schema import Ranges


def spell_magnitude(value: float) -> str:
    """A number of any size in three digits, up to a million as people write it."""
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def spell_module(name: str) -> str:
    return name or "outside of the blocks"


def spell_ranges(ranges: Ranges) -> str:
    """The module nearest to float16's largest number, and what was measured."""
    nearest = ranges.nearest()
    given = f" and {ranges.images} given" if ranges.images else ""
    return (
        f"least headroom {spell_magnitude(nearest.headroom)} at {spell_module(nearest.module)} "
        f"({nearest.largest.operator} {spell_magnitude(nearest.largest.value)}); "
        f"{len(ranges.seeds)} reference images{given}"
    )
