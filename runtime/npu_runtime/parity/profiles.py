"""Named sets of criteria, judged beside an artifact's own tolerances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from npu_runtime.parity.metrics import Check, Comparison, Metrics, check


@dataclass(frozen=True, slots=True)
class Criterion:
    """One limit on one metric of every output."""

    metric: Literal[
        "mean_relative_error",
        "trimmed_relative_error",
        "mean_cosine",
        "mean_abs_error",
        "top1_agreement",
        "top5_agreement",
    ]
    comparison: Comparison
    limit: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Criteria that belong together."""

    name: str
    criteria: tuple[Criterion, ...]


REPORTS = Profile(
    "reports",
    (
        Criterion("mean_relative_error", "at most", 0.01),
        Criterion("trimmed_relative_error", "at most", 0.01),
        Criterion("mean_cosine", "at least", 0.999),
        Criterion("mean_abs_error", "at most", 0.005),
        Criterion("mean_abs_error", "at most", 0.01),
        Criterion("top1_agreement", "at least", 1.0),
        Criterion("top5_agreement", "at least", 1.0),
    ),
)
"""What five published reports on adapting encoders to NPUs demand, taken together; they differ on the absolute error.

Looser than the tolerances of fp32 programs here, which bound the worst element and the worst image where most of these
bound means. They decide nothing: they are shown beside, so that a figure can be held against those reports'."""


PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in (REPORTS,)}


def judge_profile(output: str, metrics: Metrics, profile: Profile) -> tuple[Check, ...]:
    """A check for each criterion, in order. NaN and infinity never pass."""
    return tuple(check(output, metrics, c.metric, c.comparison, c.limit) for c in profile.criteria)
