"""Long lists of keys as people read them: one line for the same key in many layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence


def fold_keys(details: Mapping[str, str]) -> list[str]:
    """Keys with equal details, folded over one integer: `blocks.{0-2,5}.norm1.weight [64] (4)`."""
    layers: dict[tuple[str, str | None, str], list[int]] = defaultdict(list)
    for key, detail in details.items():
        number = re.search(r"(?<![^./_])(0|[1-9][0-9]*)(?![^./_])", key)
        if number is None:
            layers[key, None, detail] = []
        else:
            layers[key[: number.start()], key[number.end() :], detail].append(int(number.group()))
    lines = []
    for (before, after, detail), numbers in layers.items():
        if len(numbers) > 1:
            lines.append(f"{before}{{{_ranges(sorted(numbers))}}}{after} {detail} ({len(numbers)})")
        else:
            lines.append(f"{before}{''.join(map(str, numbers))}{after or ''} {detail}")
    return lines


def _ranges(integers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for n in integers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
