"""Differences between outputs, computed in float64, and limits on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.schema import Tolerance
from npu_runtime.parity.scales import channel_scale

Array = npt.NDArray[np.float32]
Figures = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

Comparison = Literal["at most", "at least"]

TOP = 5
"""Elements of a vector that `top5_agreement` takes, and nearest images that `neighbours_kept` does."""


@dataclass(frozen=True, slots=True)
class ImageMetrics:
    """Differences of one image's output `a`, vectors [T, D] (T = 1 for an embedding), from the expected one, `e`.

    Where `a` or `e` holds NaN or infinity, all but the agreements and the counts are NaN.
    """

    mean_cosine: float
    """Over vectors, of a·e / (||a|| ||e||); 1 where both are zero, 0 where one is."""
    min_cosine: float
    p01_cosine: float
    """Their first percentile, interpolated linearly."""
    relative_l2_error: float
    """||a - e|| / ||e|| over the whole image; 0 where both are zero, infinite where only e is."""
    max_abs_error: float
    """max |a - e|."""
    mean_abs_error: float
    mse: float
    """mean (a - e)²."""
    rmse: float
    mean_relative_error: float
    """Over elements, of |a - e| / |e|; 0 where both are zero, infinite where only e is."""
    median_relative_error: float
    """The mean of the two in the middle where their number is even."""
    trimmed_relative_error: float
    """The mean after the largest 5 % of n elements, floor(n / 20) of them, were dropped."""
    top1_agreement: float
    """Share of vectors whose largest element is at the same index, the lowest of equals; a vector with NaN or
    infinity in `a` or `e` agrees in none."""
    top5_agreement: float
    """Mean over vectors of the share of the min(5, D) largest elements that are at the same indices, the lowest of
    equals; always 1 for D of at most 5. A vector with NaN or infinity in `a` or `e` agrees in none."""
    nan: int
    """Values of `a` that are NaN."""
    infinite: int
    """Values of `a` that are infinite."""
    max_scaled_error: float | None = None
    """max |a - e| / s, where s is the larger of |e| and the element's scale, which is its channel's: massive channels
    do not swamp the others. 0 where both are zero, infinite where only s is. None in records before 1.3."""
    scaled_rmse: float | None = None
    """The root of the mean of (|a - e| / s)². None in records before 1.3."""


def measure_image(actual: Array, expected: Array, scale: Array | None = None) -> ImageMetrics:
    """Metrics of one image's output and the expected one, both [D] or [T, D] with T and D of at least one.

    `scale` is of the elements' channels, [D] or [T, D] (see parity/scales.py); without it, of `expected` alone.
    """
    if actual.shape != expected.shape or actual.ndim not in (1, 2) or actual.size == 0:
        raise ValueError(f"expected two arrays of one shape [D] or [T, D], got {actual.shape} and {expected.shape}")
    if scale is None:
        scale = channel_scale(expected)
    a, e = np.atleast_2d(actual), np.atleast_2d(expected)
    top1, top5 = _agreement(a, e)
    nan, infinite = int(np.isnan(a).sum()), int(np.isinf(a).sum())
    if np.isfinite(a).all() and np.isfinite(e).all():
        a64, e64 = a.astype(np.float64), e.astype(np.float64)
    else:
        a64 = e64 = np.full((1, 1), math.nan)  # its figures are NaN; those of the rest would hide what is broken
    dot, aa, ee = ((x * y).sum(axis=1) for x, y in ((a64, e64), (a64, a64), (e64, e64)))
    cosine = _cosine(dot, aa, ee)
    error = np.abs(a64 - e64)
    scaled = _ratio(error, np.maximum(np.abs(e64), scale if e64.shape == e.shape else 0.0))
    squares = float((error * error).sum(axis=1).sum())  # in the order of `ee`
    relative = _ratio(error, np.abs(e64)).ravel()
    n = relative.size
    kept = n - n // 20
    smallest = np.partition(relative, kept - 1)[:kept]
    low, high = (n - 1) // 2, n // 2  # both below `kept`
    middle = np.partition(smallest, (low, high))
    return ImageMetrics(
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        p01_cosine=float(np.percentile(cosine, 1)),
        relative_l2_error=float(_ratio(np.sqrt(squares), np.sqrt(ee.sum()))),
        max_abs_error=float(error.max()),
        mean_abs_error=float(error.mean()),
        mse=squares / n,
        rmse=math.sqrt(squares / n),
        mean_relative_error=float(relative.mean()),
        median_relative_error=float((middle[low] + middle[high]) / 2),
        trimmed_relative_error=float(smallest.mean()),
        top1_agreement=top1,
        top5_agreement=top5,
        nan=nan,
        infinite=infinite,
        max_scaled_error=float(scaled.max()),
        scaled_rmse=math.sqrt(float((scaled * scaled).mean())),
    )


@dataclass(frozen=True, slots=True)
class Metrics:
    """Differences of an output from the expected one, over images; each as in `ImageMetrics`.

    Where either holds NaN or infinity, all but the agreements and the counts are NaN.
    """

    images: int
    max_abs_error: float
    mean_abs_error: float
    mse: float
    rmse: float
    """The root of `mse`, which is not the mean of the images' roots."""
    min_relative_l2_error: float
    mean_relative_l2_error: float
    max_relative_l2_error: float
    mean_cosine: float
    min_cosine: float
    """Of all vectors of all images."""
    p01_cosine: float
    """The least of the images' first percentiles."""
    mean_relative_error: float
    median_relative_error: float
    """The mean of the images' medians."""
    trimmed_relative_error: float
    top1_agreement: float
    top5_agreement: float
    nan: int
    infinite: int
    max_scaled_error: float | None = None
    max_scaled_rmse: float | None = None
    """The largest `scaled_rmse` of an image."""

    @property
    def nonfinite(self) -> int:
        """Values of the output that are NaN or infinite."""
        return self.nan + self.infinite


def summarise(images: Sequence[ImageMetrics]) -> Metrics:
    """Metrics over at least one image; means are over images."""
    if not images:
        raise ValueError("expected the metrics of at least one image, got none")

    def figures(name: str) -> Figures:
        return np.array([getattr(image, name) for image in images], np.float64)

    def mean(name: str) -> float:
        return float(figures(name).mean())

    relative_l2 = figures("relative_l2_error")
    return Metrics(
        images=len(images),
        max_abs_error=float(figures("max_abs_error").max()),
        mean_abs_error=mean("mean_abs_error"),
        mse=mean("mse"),
        rmse=math.sqrt(mean("mse")),
        min_relative_l2_error=float(relative_l2.min()),
        mean_relative_l2_error=float(relative_l2.mean()),
        max_relative_l2_error=float(relative_l2.max()),
        mean_cosine=mean("mean_cosine"),
        min_cosine=float(figures("min_cosine").min()),
        p01_cosine=float(figures("p01_cosine").min()),
        mean_relative_error=mean("mean_relative_error"),
        median_relative_error=mean("median_relative_error"),
        trimmed_relative_error=mean("trimmed_relative_error"),
        top1_agreement=mean("top1_agreement"),
        top5_agreement=mean("top5_agreement"),
        nan=sum(image.nan for image in images),
        infinite=sum(image.infinite for image in images),
        max_scaled_error=float(figures("max_scaled_error").max()),
        max_scaled_rmse=float(figures("scaled_rmse").max()),
    )


def neighbours_kept(actual: Array, expected: Array, k: int = TOP) -> float | None:
    """Share of each image's k nearest others in `expected` [N, D] that are so in `actual` [N, D], mean over images.

    Near is a large cosine, zeros as in `ImageMetrics`, the lowest index of equals. k is at most N - 2, so that there
    is one to lose. NaN where either holds NaN or infinity; None
    for fewer than three images.
    """
    if actual.shape != expected.shape or actual.ndim != 2 or actual.size == 0 or k < 1:
        raise ValueError(f"expected two arrays of one shape [N, D], got {actual.shape} and {expected.shape}, k = {k}")
    if len(actual) < 3:
        return None
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return math.nan
    k = min(k, len(actual) - 2)
    return float(_in_common(_largest(_similarity(actual), k), _largest(_similarity(expected), k)).mean())


@dataclass(frozen=True, slots=True)
class Check:
    """One limit and what was measured against it."""

    output: str
    metric: str
    value: float
    limit: float
    passed: bool
    comparison: Comparison = "at most"
    """How the value must stand to the limit."""
    reason: str | None = None
    """Why it failed, in words; None where it passed."""
    group: str | None = None
    """Kind of tokens that it is of; None for the whole output."""

    @property
    def name(self) -> str:
        """`tokens max_abs_error`, `tokens cls max_scaled_error`."""
        return " ".join(filter(None, (self.output, self.group, self.metric)))


def judge(
    output: str, metrics: Metrics, tolerances: Iterable[Tolerance], group: str | None = None
) -> tuple[Check, ...]:
    """A check for each tolerance of this output, or of a kind of tokens in it. NaN and infinity never pass."""
    return tuple(
        check(output, metrics, t.metric, "at most", t.limit, group)
        for t in tolerances
        if (t.output, t.group) == (output, group)
    )


def check(
    output: str, metrics: Metrics, metric: str, comparison: Comparison, limit: float, group: str | None = None
) -> Check:
    """A check of one metric; fails whatever its value where the output or the expected one held NaN or infinity."""
    value: float = getattr(metrics, metric)
    reason = _nonfinite(metrics)
    if reason is None and not _keeps(value, comparison, limit):
        than = "more" if comparison == "at most" else "less"
        reason = f"{_spell(value, comparison, limit)} is {than} than {limit:g}"
    return Check(output, metric, value, limit, reason is None, comparison, reason, group)


def _nonfinite(metrics: Metrics) -> str | None:
    counts = {"NaN": metrics.nan, "infinite": metrics.infinite}
    found = [f"{n} {'value is' if n == 1 else 'values are'} {kind}" for kind, n in counts.items() if n]
    if not found and not math.isfinite(metrics.max_abs_error):  # the difference of float32 is finite in float64
        found = ["the expected values are not all finite"]
    return ", ".join(found) or None


def _keeps(value: float, comparison: Comparison, limit: float) -> bool:
    return value <= limit if comparison == "at most" else value >= limit


def _spell(value: float, comparison: Comparison, limit: float) -> str:
    """The value in as few digits, two or more, as still show it beyond the limit."""
    spelled = (f"{value:.{digits}g}" for digits in range(2, 18))  # 17 digits give a float64 back
    return next(text for text in spelled if not _keeps(float(text), comparison, limit))


def _agreement(a: Array, e: Array) -> tuple[float, float]:
    """Shares of the largest element, and of the five largest, that two arrays [T, D] have in common."""
    k = min(TOP, a.shape[1])
    finite = np.isfinite(a).all(axis=1) & np.isfinite(e).all(axis=1)
    ours, theirs = _largest(a[finite], k), _largest(e[finite], k)
    first = int((ours[:, 0] == theirs[:, 0]).sum())
    return first / len(a), float(_in_common(ours, theirs).sum()) / len(a)


def _largest(x: npt.NDArray[np.floating], k: int) -> Indices:
    """Indices [T, k] of the k largest elements of each row of [T, D], the largest first, the lowest of equals."""
    left, rows = x.copy(), np.arange(len(x))
    found = np.empty((len(x), k), np.intp)
    for i in range(k):  # faster than a partition, which also leaves the order of equals open
        found[:, i] = left.argmax(axis=1)
        left[rows, found[:, i]] = -np.inf
    return found


def _in_common(ours: Indices, theirs: Indices) -> Figures:
    """Share [T] of the indices in each row of [T, k] that the other's row has too."""
    common: Figures = (ours[:, :, None] == theirs[:, None, :]).any(axis=2).mean(axis=1)
    return common


def _similarity(x: Array) -> Figures:
    """Cosines [N, N] of rows with each other; minus infinity of a row with itself."""
    wide = x.astype(np.float64)
    products = np.einsum("nd,md->nm", wide, wide)  # adds in one order for every pair, so equal rows tie; BLAS may not
    squares = products.diagonal()
    cosine = _cosine(products, squares[:, None], squares)
    np.fill_diagonal(cosine, -np.inf)
    return cosine


def _cosine(dot: Figures, aa: Figures, ee: Figures) -> Figures:
    """a·e / √(a·a e·e), which is 1 to the last bit where a is e; 1 where both are zero, 0 where one is."""
    with np.errstate(invalid="ignore"):
        cosine = np.where((aa == 0) & (ee == 0), 1.0, np.where(aa * ee == 0, 0.0, dot / np.sqrt(aa * ee)))
    return np.clip(cosine, -1.0, 1.0)


def _ratio(top: Figures | np.float64, bottom: Figures | np.float64) -> Figures:
    """top / bottom, neither negative; 0 where both are zero, infinite where only the bottom is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(top == 0, 0.0, top / bottom)
