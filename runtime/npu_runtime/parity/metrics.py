"""Differences between two outputs, computed in float64.

An output of one image is vectors [T, D], `a` the actual ones and `e` the expected ones: T tokens, or T = 1 for an
embedding [D]. NaN or infinity on either side makes the figures NaN or infinite, and they never pass a limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.schema import Tolerance

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

TRIMMED = 0.05
"""Share of the largest relative errors that the trimmed mean leaves out, as published adaptation reports do."""
TOP = 5
NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class ImageMetrics:
    """Differences of the output of one image from the expected one."""

    mean_cosine: float
    """Mean over vectors of a·e / (||a|| ||e||); 1 for a vector where both are zero, 0 where one is."""
    min_cosine: float
    p01_cosine: float
    """First percentile over vectors, interpolated linearly (numpy.percentile)."""
    relative_l2_error: float
    """||a - e|| / ||e|| over the whole output; 0 where both are zero, infinite where only e is."""
    max_abs_error: float
    """max |a - e|."""
    mean_abs_error: float
    """mean |a - e|."""
    mse: float
    """mean (a - e)²."""
    rmse: float
    """Root of mse."""
    mean_relative_error: float
    """mean |a - e| / |e|, element by element; an element is 0 where both are zero, infinite where only e is."""
    median_relative_error: float
    trimmed_relative_error: float
    """The mean of those elements without the largest 5 %, rounded down."""
    top1_agreement: float
    """Share of vectors whose largest element has the same index; the lowest index of equal ones."""
    top5_agreement: float
    """Mean over vectors of the share of the min(5, D) largest elements' indices that both have."""
    nan: int
    """Elements of `a` that are NaN."""
    infinite: int
    """Elements of `a` that are infinite."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of an output over images."""

    images: int
    max_abs_error: float
    """The largest image's."""
    mean_abs_error: float
    """Mean over images, as the others that are called mean."""
    mse: float
    """Mean over images."""
    rmse: float
    """Root of that mse."""
    min_relative_l2_error: float
    mean_relative_l2_error: float
    max_relative_l2_error: float
    mean_cosine: float
    min_cosine: float
    p01_cosine: float
    """The least image's."""
    mean_relative_error: float
    median_relative_error: float
    """Mean of the images' medians."""
    trimmed_relative_error: float
    """Mean of the images' trimmed means."""
    top1_agreement: float
    top5_agreement: float
    nan: int
    infinite: int

    @property
    def nonfinite(self) -> int:
        return self.nan + self.infinite


def measure_image(actual: Array, expected: Array) -> ImageMetrics:
    """Metrics of one image's output, float32 [D] or [T, D]; raises ValueError for unequal or empty shapes."""
    if actual.shape != expected.shape or actual.ndim not in (1, 2) or actual.size == 0:
        raise ValueError(f"expected two arrays of one shape [D] or [T, D], got {actual.shape} and {expected.shape}")
    a, e = (np.atleast_2d(x).astype(np.float64) for x in (actual, expected))
    with np.errstate(divide="ignore", invalid="ignore"):  # infinity - infinity is NaN, which never passes
        difference = np.abs(a - e)
        squares = float(np.vdot(difference, difference))
        relative = _ratio(difference, np.abs(e), both_zero=0.0, zero=np.inf).ravel()
        cosine = _cosine(a, e)
        norm = math.sqrt(float(np.vdot(e, e)))
        l2 = float(_ratio(np.array(math.sqrt(squares)), np.array(norm), both_zero=0.0, zero=np.inf))
        median, trimmed = _median_and_trimmed(relative)
        p01 = float(np.percentile(cosine, 1))
        mean_relative = float(relative.mean())
    mse = squares / a.size
    largest, expected_largest = _top(a), _top(e)
    shared = (largest[:, :, None] == expected_largest[:, None, :]).any(axis=2).mean(axis=1)
    finite = np.isfinite(a).all(axis=1) & np.isfinite(e).all(axis=1)
    return ImageMetrics(
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        p01_cosine=p01,
        relative_l2_error=l2,
        max_abs_error=float(difference.max()),
        mean_abs_error=float(difference.mean()),
        mse=mse,
        rmse=math.sqrt(mse),
        mean_relative_error=mean_relative,
        median_relative_error=median,
        trimmed_relative_error=trimmed,
        top1_agreement=float(((largest[:, 0] == expected_largest[:, 0]) & finite).mean()),
        top5_agreement=float((shared * finite).mean()),
        nan=int(np.isnan(a).sum()),
        infinite=int(np.isinf(a).sum()),
    )


def summarise(images: Sequence[ImageMetrics]) -> Metrics:
    """Figures over one image or more."""

    def over(name: str) -> Doubles:
        return np.array([getattr(image, name) for image in images], np.float64)

    def mean(name: str) -> float:
        return fmean(over(name).tolist())

    l2 = over("relative_l2_error")
    mse = mean("mse")
    return Metrics(
        images=len(images),
        max_abs_error=float(over("max_abs_error").max()),
        mean_abs_error=mean("mean_abs_error"),
        mse=mse,
        rmse=math.sqrt(mse),
        min_relative_l2_error=float(l2.min()),
        mean_relative_l2_error=fmean(l2.tolist()),
        max_relative_l2_error=float(l2.max()),
        mean_cosine=mean("mean_cosine"),
        min_cosine=float(over("min_cosine").min()),
        p01_cosine=float(over("p01_cosine").min()),
        mean_relative_error=mean("mean_relative_error"),
        median_relative_error=mean("median_relative_error"),
        trimmed_relative_error=mean("trimmed_relative_error"),
        top1_agreement=mean("top1_agreement"),
        top5_agreement=mean("top5_agreement"),
        nan=sum(image.nan for image in images),
        infinite=sum(image.infinite for image in images),
    )


def neighbours_kept(actual: Array, expected: Array) -> float | None:
    """Mean over images of the share of their nearest others that are the same before and after.

    The min(5, N - 1) nearest of each embedding [N, D] by cosine, itself left out, the first of equally near ones.
    None for fewer than three images, where there is nothing to choose among.
    """
    count = len(actual)
    if count < 3:
        return None
    nearest = min(NEIGHBOURS, count - 1)
    with np.errstate(invalid="ignore", over="ignore"):
        before, after = _nearest(expected, nearest), _nearest(actual, nearest)
    return fmean(len(set(one) & set(other)) / nearest for one, other in zip(before.tolist(), after.tolist()))


@dataclass(frozen=True, slots=True)
class Check:
    """One limit and what was measured against it."""

    output: str
    metric: str
    value: float
    limit: float
    comparison: Literal["at most", "at least"]
    passed: bool
    reason: str | None
    """Why it did not pass, in words; None where it did."""


def judge(output: str, metrics: Metrics, tolerances: Iterable[Tolerance]) -> tuple[Check, ...]:
    """A check for each tolerance of this output. NaN and infinity never pass."""
    return tuple(
        check(output, metrics, tolerance.metric, "at most", tolerance.limit)
        for tolerance in tolerances
        if tolerance.output == output
    )


def check(
    output: str, metrics: Metrics, metric: str, comparison: Literal["at most", "at least"], limit: float
) -> Check:
    """One metric, by its name in `Metrics`, against a limit that is itself allowed."""
    value: float = getattr(metrics, metric)
    within = bool(value <= limit) if comparison == "at most" else bool(value >= limit)
    passed = within and metrics.nonfinite == 0 and math.isfinite(value)
    if passed:
        reason = None
    elif metrics.nonfinite:
        reason = f"{metrics.nan} values are NaN and {metrics.infinite} infinite"
    elif not math.isfinite(value):
        reason = f"{value} is no number to judge"
    else:
        reason = f"{value:.3g} is {'more' if comparison == 'at most' else 'less'} than {limit:g}"
    return Check(output, metric, value, limit, comparison, passed, reason)


def _cosine(a: Doubles, e: Doubles) -> Doubles:
    """Of each vector."""
    actual, expected = (np.sqrt(np.einsum("td,td->t", x, x)) for x in (a, e))
    cosine = _ratio(np.einsum("td,td->t", a, e), actual * expected, both_zero=1.0, zero=0.0)
    cosine[(actual == 0) != (expected == 0)] = 0.0
    return cosine


def _median_and_trimmed(errors: Doubles) -> tuple[float, float]:
    """The median, and the mean without the largest; NaN where one of them is NaN."""
    if np.isnan(errors).any():
        return math.nan, math.nan
    kept = errors.size - int(TRIMMED * errors.size)
    middle = errors.size // 2
    ordered = np.partition(errors, sorted({max(middle - 1, 0), middle, kept - 1}))
    median = ordered[middle] if errors.size % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return float(median), float(ordered[:kept].mean())


def _top(x: Doubles) -> npt.NDArray[np.intp]:
    """Indices [T, min(5, D)] of the largest elements, the largest first, the lower index of equal ones first."""
    count = min(TOP, x.shape[1])
    if count == x.shape[1]:
        return np.argsort(-x, axis=1, kind="stable")
    least = np.partition(x, x.shape[1] - count, axis=1)[:, x.shape[1] - count, None]
    tied = (x >= least).sum(axis=1) != count  # or NaN
    rows = np.argpartition(x, x.shape[1] - count, axis=1)[:, -count:]
    rows.sort(axis=1)
    order = np.argsort(-np.take_along_axis(x, rows, axis=1), axis=1, kind="stable")
    top: npt.NDArray[np.intp] = np.take_along_axis(rows, order, axis=1)
    top[tied] = np.argsort(-x[tied], axis=1, kind="stable")[:, :count]
    return top


def _nearest(embeddings: Array, count: int) -> npt.NDArray[np.intp]:
    """Indices [N, count] of the nearest others by cosine."""
    x = embeddings.astype(np.float64)
    norm = np.sqrt(np.einsum("nd,nd->n", x, x))[:, None]
    unit = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    distance = -(unit @ unit.T)
    np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1, kind="stable")[:, :count]


def _ratio(top: Doubles, bottom: Doubles, *, both_zero: float, zero: float) -> Doubles:
    return np.where(bottom == 0, np.where(top == 0, both_zero, np.where(np.isnan(top), np.nan, zero)), top / bottom)
