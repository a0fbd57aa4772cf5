"""Which layout a checkpoint has: the one under which every tensor is used once and every parameter filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from npu_export.checkpoint import CONTAINERS
from npu_export.encoders.spec import EncoderSpec, Layout, Lookalike, Positions
from npu_export.key_folding import fold_keys
from npu_export.keymap import Drop, KeymapPlan, Rule, Shapes, match_template, plan_keymap
from npu_export.operations import Chain, ResamplePositions, grid_size

PREFIXES = ("module.", "_orig_mod.", "visual.", "vision_model.", "image_encoder.")
"""What other tools put before a tower's keys: DataParallel, torch.compile, and models with several towers."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout, the prefix before its keys, and what its rules do with the whole checkpoint."""

    layout: Layout
    prefix: str
    keymap: KeymapPlan

    @property
    def fills(self) -> bool:
        """The network is filled, whatever else the file holds."""
        return not (self.keymap.missing or self.keymap.mismatched)

    def __str__(self) -> str:
        under = f" under {self.prefix!r}" if self.prefix else ""
        return f"layout {self.layout.name} ({self.layout.about}){under}"


def candidates(
    layouts: Iterable[Layout],
    shapes: Shapes,
    target: Shapes,
    *,
    prefix: str | None = None,
    resample: bool = False,
) -> list[Candidate]:
    """Every layout with every prefix that the keys have, or with the one that is asked for.

    `target` holds the network's shapes. Keys outside a prefix that was asked for are dropped by that
    choice. With `resample`, positions of another grid are resampled.
    """
    found = []
    for layout in layouts:
        for chain in _prefix_chains(shapes, layout) if prefix is None else [(prefix,) if prefix else ()]:
            rules = _under_prefix(layout, chain)
            joined = "".join(chain)
            if resample and layout.positions is not None:
                rules = _with_resampling(rules, layout.positions, shapes, target)
            outside = _beside_container(shapes, joined) if prefix is None else _not_chosen(shapes, prefix, layout)
            inside = {key: shape for key, shape in shapes.items() if key not in outside}
            plan = plan_keymap(rules, inside, target)
            found.append(Candidate(layout, joined, replace(plan, dropped={**plan.dropped, **outside})))
    return found


def nearest(found: Iterable[Candidate]) -> Candidate:
    """The candidate that uses most of the file and leaves least over."""
    return max(found, key=lambda c: (c.keymap.complete, c.fills, len(c.keymap.sources()), -len(c.keymap.unexpected)))


def duplicates(candidate: Candidate) -> dict[str, str]:
    """Keys that are left over and, without their prefixes, name what another key fills already."""
    layout = candidate.layout
    bare = {key.removeprefix(candidate.prefix): key for key in candidate.keymap.sources()}
    return {
        key: bare[stripped]
        for key in candidate.keymap.unexpected
        if (stripped := key.removeprefix("".join(_tokens(key, layout)))) in bare
    }


def lookalikes(encoder: EncoderSpec, candidate: Candidate) -> list[str]:
    """What left-over or misshapen keys tell of another model."""
    keymap = candidate.keymap
    wrong: dict[str, tuple[int, ...]] = dict(keymap.unexpected)
    mismatched = {mismatch.target: mismatch for mismatch in keymap.mismatched}
    for move in keymap.moves:
        for target in move.targets:
            if target in mismatched:
                wrong.update(zip(move.sources, mismatched[target].got))
    return list(dict.fromkeys(known.text for known in encoder.published.lookalikes if _seen(known, wrong, candidate)))


def _seen(known: Lookalike, wrong: Shapes, candidate: Candidate) -> bool:
    return any(
        match_template(known.key, key.removeprefix(candidate.prefix)) and known.shape in (None, shape)
        for key, shape in wrong.items()
    )


def _prefix_chains(shapes: Shapes, layout: Layout) -> list[tuple[str, ...]]:
    """Every chain of known prefixes at the front of some key, the empty one first."""
    chains: dict[tuple[str, ...], None] = {(): None}
    for key in shapes:
        tokens = _tokens(key, layout)
        chains.update({tokens[:length]: None for length in range(1, len(tokens) + 1)})
    return list(chains)


def _tokens(key: str, layout: Layout) -> tuple[str, ...]:
    known = (*CONTAINERS, *PREFIXES, *((layout.prefix,) if layout.prefix else ()))
    tokens: list[str] = []
    rest = key
    while token := next((k for k in known if rest.startswith(k)), None):
        tokens.append(token)
        rest = rest[len(token) :]
    return tuple(tokens)


def _under_prefix(layout: Layout, chain: tuple[str, ...]) -> tuple[Rule | Drop, ...]:
    """The layout's rules with their keys under the chain, and what may lie beside a tower under less of it."""
    joined = "".join(chain)
    rules: list[Rule | Drop] = [
        Drop(joined + rule.source, rule.because)
        if isinstance(rule, Drop)
        else replace(rule, sources=tuple(joined + source for source in rule.sources))
        for rule in layout.rules
    ]
    for length in range(len(chain)):
        rules += [Drop("".join(chain[:length]) + rule.source, rule.because) for rule in layout.beside]
    return tuple(rules)


def _beside_container(shapes: Shapes, prefix: str) -> dict[str, str]:
    """Keys outside of the dict in which the prefix lies, and why they are dropped."""
    container = prefix[: prefix.rfind("/") + 1]
    return {key: f"outside of the container {container}" for key in shapes if not key.startswith(container)}


def _not_chosen(shapes: Shapes, prefix: str, layout: Layout) -> dict[str, str]:
    """Keys outside of a prefix that was asked for; those with any known prefix where it is the empty one."""
    return {
        key: f"outside of the prefix {prefix!r} that was asked for"
        for key in shapes
        if not key.startswith(prefix) or (not prefix and _tokens(key, layout))
    }


def _with_resampling(
    rules: tuple[Rule | Drop, ...], positions: Positions, source: Shapes, target: Shapes
) -> tuple[Rule | Drop, ...]:
    """The rules, with positions of another grid resampled to the network's."""
    resampled = []
    for rule in rules:
        if isinstance(rule, Rule) and positions.target in rule.targets and all(key in source for key in rule.sources):
            got = rule.operation.target_shapes([source[key] for key in rule.sources])
            before, after = (
                grid_size(shape[1] - positions.prefix) if len(shape) == 3 else None
                for shape in (got[-1] if got else (), target[positions.target])
            )
            if before is not None and after is not None and before != after:
                operation = ResamplePositions(
                    positions.prefix, before, after, positions.mode, positions.antialias, positions.align_corners
                )
                rule = replace(rule, operation=Chain((rule.operation, operation)))
        resampled.append(rule)
    return tuple(resampled)


def describe_coverage(keymap: KeymapPlan) -> Iterator[str]:
    """A line for each key that is not simply copied, folded by layer."""
    for key in fold_keys({target: f"by {operation}" for target, operation in keymap.transformed().items()}):
        yield f"transformed {key}"
    for key in fold_keys({key: f"({reason})" for key, reason in keymap.dropped.items()}):
        yield f"dropped     {key}"
