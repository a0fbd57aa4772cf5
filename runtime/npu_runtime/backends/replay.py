"""Whether replays of a captured graph give what plain calls give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from npu_runtime.artifact.schema import Manifest

SHARE = 1e-2
"""A replay must be this much nearer to the plain call on its own input than that is to the call on another input: a
replay that leaves stale outputs behind is off by the whole distance, however wide the output's tolerance is."""

Outputs = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that an output of a replay may differ from a plain call's; 0 asks for equality bit for bit."""

    output: str
    max_abs: float
    relative_l2: float
    """Of an image, ||a - e|| / ||e||."""


def replay_limits(manifest: Manifest, kind: str) -> tuple[Limits, ...]:
    """The outputs' own tolerances on a kind of device, in the manifest's order; 0 for an output without any."""
    found: dict[str, dict[str, float]] = {output.name: {} for output in manifest.outputs}
    for tolerance in (t for t in manifest.tolerances_on(kind) if t.group is None):
        found[tolerance.output][tolerance.metric] = tolerance.limit

    def limits(output: str, by_metric: Mapping[str, float]) -> Limits:
        missing = math.inf if by_metric else 0.0
        return Limits(output, by_metric.get("max_abs_error", missing), by_metric.get("max_relative_l2_error", missing))

    return tuple(limits(output, by_metric) for output, by_metric in found.items())


@dataclass(frozen=True, slots=True)
class Verdict:
    """How replays compare with plain calls on the same inputs."""

    max_abs_difference: float
    """The largest of any output; 0 when all are equal bit for bit, infinite where one alone holds NaN or infinity."""
    breach: str | None
    """The output that differs most beyond its limits, by how much, and the limit; None where all are within."""


def judge_replays(replayed: Sequence[Outputs], plain: Sequence[Outputs], limits: Sequence[Limits]) -> Verdict:
    """Compare the outputs of replays, on the CPU, with those of plain calls on the same inputs, two or more."""
    largest, breaches = 0.0, []
    for place, limit in enumerate(limits):
        expected = [outputs[place] for outputs in plain]
        apart = max(_largest(_gaps(a, b)) for a, b in itertools.pairwise(expected))
        for run, outputs in enumerate(replayed):
            gaps = _gaps(outputs[place], expected[run])
            differs, relative = _largest(gaps), _relative_l2(gaps, expected[run])
            largest = max(largest, differs)
            most = min(limit.max_abs, SHARE * apart)
            if differs > most:
                breaches.append((differs, f"{limit.output} differs by {differs:.1e}, limit {most:.1e}"))
            elif relative > limit.relative_l2:
                told = f"{limit.output} differs by {relative:.1e} of its norm, limit {limit.relative_l2:.1e}"
                breaches.append((differs, told))
    return Verdict(largest, max(breaches)[1] if breaches else None)


def _gaps(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|a - e| in float64: 0 where both are NaN or the same infinity, infinite where one alone is either."""
    a, e = actual.double(), expected.double()
    same = (a == e) | (a.isnan() & e.isnan())
    return (a - e).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def _largest(gaps: torch.Tensor) -> float:
    return float(gaps.max()) if gaps.numel() else 0.0


def _relative_l2(gaps: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the worst image; 0 where both are zero."""
    norms = expected.double().nan_to_num(0, 0, 0).flatten(1).norm(dim=1)
    return _largest((gaps.flatten(1).norm(dim=1) / norms).nan_to_num(nan=0.0, posinf=math.inf))
