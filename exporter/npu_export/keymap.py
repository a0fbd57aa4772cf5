"""Declarative remapping of a checkpoint's keys to a network's, with total coverage.

A rule names whole keys by templates in which `{i}` stands for one integer. Templates read both ways and
their order never matters: two rules for one key, or two keys for one target, are errors. `plan_keymap`
is pure and decides everything from names and shapes; `read_mapped` then moves tensors.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Rename:
    """One key becomes another; the tensor stays as it is."""

    source: str
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def target_shape(self, shapes: Sequence[Shape]) -> Shape | None:
        """Shape of the result; None where the shapes do not fit together."""
        return shapes[0]

    def source_shapes(self, target: Shape) -> tuple[Shape, ...]:
        """Shapes that the sources must have for a target of this shape."""
        return (target,)

    def apply(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0]


@dataclass(frozen=True, slots=True)
class Concatenate:
    """Several keys become one, joined along `dim` in this order, in equal parts."""

    sources: tuple[str, ...]
    target: str
    dim: int = 0

    def target_shape(self, shapes: Sequence[Shape]) -> Shape | None:
        """Shape of the result; None where the parts are not equal."""
        first = shapes[0]
        if any(shape != first for shape in shapes) or self.dim >= len(first):
            return None
        return (*first[: self.dim], first[self.dim] * len(shapes), *first[self.dim + 1 :])

    def source_shapes(self, target: Shape) -> tuple[Shape, ...]:
        """Shapes that the sources must have for a target of this shape."""
        part = (*target[: self.dim], target[self.dim] // len(self.sources), *target[self.dim + 1 :])
        return (part,) * len(self.sources)

    def apply(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.cat(tuple(tensors), dim=self.dim)


@dataclass(frozen=True, slots=True)
class Drop:
    """A key that the encoder does not use, and why."""

    source: str
    because: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)


MoveRule = Rename | Concatenate
Rule = MoveRule | Drop


@dataclass(frozen=True, slots=True)
class Move:
    """One target tensor and the keys it is made of."""

    rule: MoveRule
    sources: tuple[str, ...]
    target: str


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A target whose shape the checkpoint does not give."""

    target: str
    expected: Shape
    got: tuple[Shape, ...]
    """Shapes of the source tensors."""


@dataclass(frozen=True, slots=True)
class KeymapPlan:
    """What happens to every key of a checkpoint and where every target comes from."""

    moves: tuple[Move, ...]
    dropped: Mapping[str, str]
    """Key -> why it is not used."""
    missing: Mapping[str, Shape]
    """Key that the checkpoint lacks -> the shape it should have."""
    unexpected: Mapping[str, Shape]
    """Key that no rule names -> its shape."""
    mismatched: tuple[Mismatch, ...]

    @property
    def complete(self) -> bool:
        """Every key used once or dropped by a rule, every target filled, every shape as expected."""
        return not (self.missing or self.unexpected or self.mismatched)

    def faults(self) -> Iterator[str]:
        """A line for each fault, folded by layer."""
        for key in fold_keys({key: f"{list(shape)}" for key, shape in self.missing.items()}):
            yield f"missing     {key}"
        for key in fold_keys({key: f"{list(shape)}" for key, shape in self.unexpected.items()}):
            yield f"unexpected  {key}"
        details = {
            m.target: f"expected {list(m.expected)}, got {' + '.join(str(list(shape)) for shape in m.got)}"
            for m in self.mismatched
        }
        for key in fold_keys(details):
            yield f"mismatched  {key}"


def plan_keymap(rules: Sequence[Rule], source: Shapes, target: Shapes) -> KeymapPlan:
    """What the rules do with a checkpoint's tensors for a network's tensors, both given as shapes.

    Raises ValueError when the rules themselves are wrong: two for one key, or two keys for one target.
    """
    dropped: dict[str, str] = {}
    unexpected: dict[str, Shape] = {}
    for key, shape in source.items():
        match _rule_of(rules, key):
            case None:
                unexpected[key] = shape
            case Drop(because=because):
                dropped[key] = because
    moves: list[Move] = []
    missing: dict[str, Shape] = {}
    mismatched: list[Mismatch] = []
    used: set[str] = set()
    for name, shape in target.items():
        move = _move_to(rules, name)
        if move is None:
            missing[name] = shape
            continue
        used.update(move.sources)
        absent = [key for key in move.sources if key not in source]
        if absent:
            expected = dict(zip(move.sources, move.rule.source_shapes(shape)))
            missing.update({key: expected[key] for key in absent})
            continue
        got = tuple(source[key] for key in move.sources)
        if move.rule.target_shape(got) != shape:
            mismatched.append(Mismatch(name, shape, got))
        else:
            moves.append(move)
    leftover = {key: source[key] for key in source if key not in used and key not in dropped and key not in unexpected}
    return KeymapPlan(tuple(moves), dropped, missing, unexpected | leftover, tuple(mismatched))


def source_shapes(rules: Sequence[Rule], target: Shapes) -> dict[str, Shape]:
    """Keys and shapes of the checkpoint from which the rules fill this network, dropped keys left out."""
    shapes: dict[str, Shape] = {}
    for name, shape in target.items():
        move = _move_to(rules, name)
        if move is not None:
            shapes.update(zip(move.sources, move.rule.source_shapes(shape)))
    return shapes


def read_mapped(plan: KeymapPlan, read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each target's name and tensor, read and joined one at a time. The plan must be complete."""
    if not plan.complete:
        raise ValueError("the plan is not complete")
    for move in plan.moves:
        yield move.target, move.rule.apply([read(key) for key in move.sources])


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


def _rule_of(rules: Iterable[Rule], key: str) -> Rule | None:
    found = [rule for rule in rules if any(_pattern(s).fullmatch(key) for s in rule.sources)]
    if len(found) > 1:
        raise ValueError(f"two rules name the key {key}: {found[0]} and {found[1]}")
    return found[0] if found else None


def _move_to(rules: Iterable[Rule], target: str) -> Move | None:
    found = []
    for rule in rules:
        if not isinstance(rule, Drop) and (match := _pattern(rule.target).fullmatch(target)):
            found.append(Move(rule, tuple(s.format(**match.groupdict()) for s in rule.sources), target))
    if len(found) > 1:
        raise ValueError(f"two rules fill the target {target}: {found[0].rule} and {found[1].rule}")
    return found[0] if found else None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    literals, names = parts[0::2], parts[1::2]
    pattern = re.escape(literals[0])
    for name, literal in zip(names, literals[1:]):
        pattern += f"(?P<{name}>0|[1-9][0-9]*)" + re.escape(literal)
    return re.compile(pattern)
