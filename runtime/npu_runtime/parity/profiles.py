"""Criteria that others judge by, shown beside the artifact's own tolerances; they decide nothing.

`reports` is what five published adaptations of vision encoders to Ascend accept. They are looser than this project's
limits: a network whose queries and keys are swapped in one layer still has a cosine of 0.9997.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from npu_runtime.parity.metrics import Check, Metrics, check


@dataclass(frozen=True, slots=True)
class Criterion:
    """The most or the least that a metric may be."""

    metric: str
    comparison: Literal["at most", "at least"]
    limit: float


PROFILES: Mapping[str, Sequence[Criterion]] = {
    "reports": (
        Criterion("mean_relative_error", "at most", 0.01),
        Criterion("trimmed_relative_error", "at most", 0.01),
        Criterion("mean_cosine", "at least", 0.999),
        Criterion("mean_abs_error", "at most", 0.005),
        Criterion("mean_abs_error", "at most", 0.01),
        Criterion("top1_agreement", "at least", 1),
        Criterion("top5_agreement", "at least", 1),
    ),
}


def judge_profile(output: str, metrics: Metrics, profile: Sequence[Criterion]) -> tuple[Check, ...]:
    """A check for each criterion."""
    return tuple(check(output, metrics, c.metric, c.comparison, c.limit) for c in profile)
