"""Declarative remapping of a checkpoint's keys to a network's, with total coverage.

A rule names whole keys by templates in which `{i}` stands for one integer, and an operation on their
tensors. Templates read both ways and their order never matters: two rules for one key, or two keys for
one target, are errors. `plan_keymap` is pure and decides everything from names and shapes; `read_mapped`
then moves tensors.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_export.key_folding import fold_keys
from npu_export.operations import COPY, Concatenate, Operation, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Rule:
    """Keys of the checkpoint, keys of the network, and what is done to the tensors between them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operation: Operation


@dataclass(frozen=True, slots=True)
class Drop:
    """A key that the encoder does not use, and why."""

    source: str
    because: str


def rename(source: str, target: str) -> Rule:
    """One key becomes another; the tensor stays as it is."""
    return Rule((source,), (target,), COPY)


def concatenate(sources: Sequence[str], target: str, dim: int = 0) -> Rule:
    """Several keys become one, joined along `dim` in this order, in equal parts."""
    return Rule(tuple(sources), (target,), Concatenate(len(sources), dim))


def invert(rules: Iterable[Rule | Drop]) -> tuple[Rule, ...]:
    """The rules from the network back to the checkpoint, dropped keys left out.

    Raises ValueError where an operation loses information.
    """
    inverted = []
    for rule in rules:
        if isinstance(rule, Rule):
            inverse = rule.operation.inverse()
            if inverse is None:
                raise ValueError(f"{', '.join(rule.targets)}: {rule.operation} loses information")
            inverted.append(Rule(rule.targets, rule.sources, inverse))
    return tuple(inverted)


@dataclass(frozen=True, slots=True)
class Move:
    """A rule for one set of keys: `{i}` has its value."""

    rule: Rule
    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A target whose shape the checkpoint does not give."""

    target: str
    """Where a rule only checks a key, that key."""
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

    def sources(self) -> list[str]:
        """Keys of the checkpoint that are used."""
        return [key for move in self.moves for key in move.sources]

    def transformed(self) -> dict[str, str]:
        """Target -> the operation that makes it, for all that are not plain copies."""
        return {t: str(m.rule.operation) for m in self.moves if m.rule.operation != COPY for t in m.targets}

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


def plan_keymap(rules: Sequence[Rule | Drop], source: Shapes, target: Shapes) -> KeymapPlan:
    """What the rules do with a checkpoint's tensors for a network's tensors, both given as shapes.

    Raises ValueError when the rules themselves are wrong: two for one key, or two keys for one target.
    """
    rule_of = {key: _rule_of(rules, key) for key in source}
    dropped = {key: rule.because for key, rule in rule_of.items() if isinstance(rule, Drop)}
    possible = _moves_to(rules, target)
    moves, missing, mismatched = list[Move](), dict[str, Shape](), list[Mismatch]()
    for move in possible:
        expected = tuple(target[name] for name in move.targets)
        absent = [key for key in move.sources if key not in source]
        if absent:
            shapes = move.rule.operation.source_shapes(expected)
            missing.update({key: shape for key, shape in zip(move.sources, shapes) if key in absent})
            continue
        moves.append(move)
        given = tuple(source[key] for key in move.sources)
        got = move.rule.operation.target_shapes(given)
        for index, name in enumerate(move.targets):
            if got is None or got[index] != expected[index]:
                mismatched.append(Mismatch(name, expected[index], given))
        if not move.targets and got is None:
            (shape,) = move.rule.operation.source_shapes(expected)
            mismatched.append(Mismatch(move.sources[0], shape, given))
    filled = {name for move in possible for name in move.targets}
    missing.update({name: shape for name, shape in target.items() if name not in filled})
    # A key whose partner is missing is known: only what no rule names, or leads nowhere, is unexpected.
    known = {key for move in possible for key in move.sources}
    unexpected = {key: shape for key, shape in source.items() if key not in known and key not in dropped}
    return KeymapPlan(tuple(moves), dropped, missing, unexpected, tuple(mismatched))


def source_shapes(rules: Sequence[Rule | Drop], target: Shapes) -> dict[str, Shape]:
    """Keys and shapes of the checkpoint from which the rules fill this network, dropped keys left out."""
    shapes: dict[str, Shape] = {}
    for move in _moves_to(rules, target):
        expected = tuple(target[name] for name in move.targets)
        shapes.update(zip(move.sources, move.rule.operation.source_shapes(expected)))
    return shapes


def read_mapped(plan: KeymapPlan, read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each target's name and tensor, made one rule at a time. The plan must be complete."""
    if not plan.complete:
        raise ValueError("the plan is not complete")
    for move in plan.moves:
        yield from zip(move.targets, move.rule.operation.apply([read(key) for key in move.sources]))


def match_template(template: str, key: str) -> bool:
    """Whether the template names this whole key."""
    return _pattern(template).fullmatch(key) is not None


def _rule_of(rules: Iterable[Rule | Drop], key: str) -> Rule | Drop | None:
    found = [
        rule
        for rule in rules
        if any(_pattern(s).fullmatch(key) for s in ((rule.source,) if isinstance(rule, Drop) else rule.sources))
    ]
    if len(found) > 1:
        raise ValueError(f"two rules name the key {key}: {found[0]} and {found[1]}")
    return found[0] if found else None


def _moves_to(rules: Sequence[Rule | Drop], targets: Shapes) -> list[Move]:
    """The moves that fill these targets, each once; targets that no rule fills are left out.

    A rule without targets, such as the inverse of one that makes zeros, is always a move: it checks one whole key.
    """
    moves: dict[tuple[str, ...], Move] = {}
    rule_of: dict[str, Rule] = {}
    for rule in rules:
        for template in rule.targets if isinstance(rule, Rule) else ():
            pattern = _pattern(template)
            for name in targets:
                if match := pattern.fullmatch(name):
                    assert isinstance(rule, Rule)
                    if name in rule_of:
                        raise ValueError(f"two rules fill the target {name}: {rule_of[name]} and {rule}")
                    rule_of[name] = rule
                    numbers = match.groupdict()
                    sources, all_targets = (
                        tuple(t.format(**numbers) for t in templates) for templates in (rule.sources, rule.targets)
                    )
                    moves[all_targets] = Move(rule, sources, all_targets)
    lacking = [name for move in moves.values() for name in move.targets if name not in targets]
    if lacking:
        raise ValueError(f"rules fill targets that the network lacks: {', '.join(lacking)}")
    checks = [Move(rule, rule.sources, ()) for rule in rules if isinstance(rule, Rule) and not rule.targets]
    return [*moves.values(), *checks]


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    literals, names = parts[0::2], parts[1::2]
    pattern = re.escape(literals[0])
    for name, literal in zip(names, literals[1:]):
        pattern += f"(?P<{name}>0|[1-9][0-9]*)" + re.escape(literal)
    return re.compile(pattern)
