"""Differences between two outputs, computed in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.schema import Tolerance

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Differences of an output [N, ...] from the expected one. NaN where either holds no number."""

    max_abs_error: float
    """max |a - e|."""
    mean_abs_error: float
    """mean |a - e|."""
    max_relative_l2_error: float
    """The largest over images of ||a - e|| / ||e||; 0 where both are zero, infinite where only e is."""
    min_cosine: float
    """The smallest over vectors (last axis) of a·e / (||a|| ||e||); 1 where both are zero, 0 where one is."""
    nonfinite: int
    """Values of `a` that are NaN or infinite."""


def compare(actual: Array, expected: Array) -> Metrics:
    """Metrics of two arrays of one shape, [N, ..., D] with N and D of at least one."""
    if actual.shape != expected.shape or actual.ndim < 2 or actual.size == 0:
        raise ValueError(f"expected two arrays of one shape [N, ..., D], got {actual.shape} and {expected.shape}")
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    images = (len(a), -1)
    with np.errstate(divide="ignore", invalid="ignore"):  # infinity - infinity is NaN, which never passes
        error = np.abs(a - e)
        relative = _ratio(_norm((a - e).reshape(images)), _norm(e.reshape(images)), both_zero=0.0, zero=np.inf)
        cosine = _ratio((a * e).sum(axis=-1), _norm(a) * _norm(e), both_zero=1.0, zero=0.0)
    only_one_zero = (_norm(a) == 0) != (_norm(e) == 0)
    cosine[only_one_zero] = 0.0
    return Metrics(
        max_abs_error=float(error.max()),
        mean_abs_error=float(error.mean()),
        max_relative_l2_error=float(relative.max()),
        min_cosine=float(cosine.min()),
        nonfinite=int((~np.isfinite(a)).sum()),
    )


@dataclass(frozen=True, slots=True)
class Check:
    """One limit and what was measured against it."""

    output: str
    metric: str
    value: float
    limit: float
    passed: bool


def judge(output: str, metrics: Metrics, tolerances: Iterable[Tolerance]) -> tuple[Check, ...]:
    """A check for each tolerance of this output. NaN and infinity never pass."""
    checks = []
    for tolerance in tolerances:
        if tolerance.output == output:
            value: float = getattr(metrics, tolerance.metric)
            passed = metrics.nonfinite == 0 and bool(value <= tolerance.limit)
            checks.append(Check(output, tolerance.metric, value, tolerance.limit, passed))
    return tuple(checks)


def _norm(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norm: npt.NDArray[np.float64] = np.sqrt((x * x).sum(axis=-1))
    return norm


def _ratio(
    top: npt.NDArray[np.float64], bottom: npt.NDArray[np.float64], *, both_zero: float, zero: float
) -> npt.NDArray[np.float64]:
    return np.where(bottom == 0, np.where(top == 0, both_zero, zero), top / bottom)
