"""Statistics of latencies, and comparisons whose verdict is no stronger than the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEAST_SAMPLES = {50: 1, 90: 20, 95: 40, 99: 100}
"""Percentile -> samples below which it is not given: at least two, or one for p99, must lie beyond it."""
NOISY = 0.1
"""Interquartile range over median above which samples are labelled noisy. Source: _IQR_WARN_THRESHOLD of
torch/utils/benchmark/utils/common.py."""
MARGIN = 0.02
"""Speedups from 1 / (1 + MARGIN) to 1 + MARGIN count as the same."""
CONFIDENCE = 0.95
"""Least probability that an interval covers what it estimates."""

NARROW = 0.01
"""Half width of an interval, over its speedup, below which no more rounds are needed."""
LEAST_ROUNDS = 20
"""Rounds before which no interval is taken for narrow: a few alike ratios are no evidence of more."""

Verdict = Literal["faster", "slower", "same", "undecided"]


@dataclass(frozen=True, slots=True)
class Latency:
    """Statistics of call latencies. A percentile is None where the samples are too few for it."""

    samples: int
    mean_ms: float
    median_ms: float
    minimum_ms: float
    maximum_ms: float
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    standard_deviation_ms: float | None
    """Of n - 1 degrees of freedom; None for one sample."""
    interquartile_range_ms: float
    """From the 25th percentile to the 75th."""
    images_per_second: float
    """Batch size over the median."""
    noisy: bool
    """The interquartile range is above NOISY of the median. Such samples are kept."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Both ends belong to it."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many times as fast as a baseline something is: baseline's time over its own, above 1 is faster."""

    speedup: float
    interval: Interval | None
    """Of CONFIDENCE; None where the samples are too few for one."""
    verdict: Verdict


def summarise_latency(samples_ms: Sequence[float], batch: int) -> Latency:
    """Statistics of at least one sample; percentiles are interpolated linearly (numpy's default)."""
    samples = np.asarray(samples_ms, np.float64)
    percentiles = {
        p: float(np.percentile(samples, p)) if len(samples) >= least else None for p, least in LEAST_SAMPLES.items()
    }
    median = float(np.median(samples))
    first, third = (float(quartile) for quartile in np.percentile(samples, (25, 75)))
    return Latency(
        samples=len(samples),
        mean_ms=float(samples.mean()),
        median_ms=median,
        minimum_ms=float(samples.min()),
        maximum_ms=float(samples.max()),
        p50_ms=percentiles[50],
        p90_ms=percentiles[90],
        p95_ms=percentiles[95],
        p99_ms=percentiles[99],
        standard_deviation_ms=float(samples.std(ddof=1)) if len(samples) > 1 else None,
        interquartile_range_ms=third - first,
        images_per_second=1000 * batch / median,
        noisy=third - first > NOISY * median,
    )


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The narrowest pair of order statistics, as far from either end, that covers the median with `confidence`.

    Of n independent values [x(k), x(n + 1 - k)] covers it with a probability of at least
    1 - 2 P(Bin(n, 1/2) < k), whatever their distribution; it inverts the sign test. None where even the
    least and the largest value do not reach the confidence: below 6 values for 0.95. Source: H. A. David and
    H. N. Nagaraja, Order Statistics, 3rd edition, 2003, section 7.1.
    """
    count = len(values)
    k = 0
    outcomes = below = 1  # of 2 ** count outcomes of the signs, those with k, and with at most k, on one side
    while 2 * below / 2**count <= 1 - confidence:
        outcomes = outcomes * (count - k) // (k + 1)
        k += 1
        below += outcomes
    if k == 0:
        return None
    ordered = sorted(values)
    return Interval(ordered[k - 1], ordered[count - k])


def compare_paired(baseline_ms: Sequence[float], samples_ms: Sequence[float]) -> Comparison:
    """Speedup of two series of the same rounds: the median of the rounds' ratios, so that drift cancels.

    The interval is that of `median_interval` over the ratios.
    """
    ratios = np.asarray(baseline_ms, np.float64) / np.asarray(samples_ms, np.float64)
    interval = median_interval(ratios.tolist())
    return Comparison(float(np.median(ratios)), interval, judge_interval(interval))


def compare_apart(baseline_ms: Sequence[float], samples_ms: Sequence[float]) -> Comparison:
    """Speedup of two series from different runs: the ratio of their medians.

    The interval goes from the least to the largest ratio of medians out of two intervals of half the doubt
    each (Bonferroni), so that both hold with CONFIDENCE. What changed between the runs is not in it.
    """
    each = 1 - (1 - CONFIDENCE) / 2
    baseline, own = median_interval(baseline_ms, each), median_interval(samples_ms, each)
    interval = None
    if baseline is not None and own is not None:
        interval = Interval(baseline.low / own.high, baseline.high / own.low)
    return Comparison(float(np.median(baseline_ms) / np.median(samples_ms)), interval, judge_interval(interval))


def is_narrow(comparison: Comparison, rounds: int) -> bool:
    """Whether more than `rounds` rounds would tell little more: the interval is narrower than NARROW allows."""
    interval = comparison.interval
    if interval is None or rounds < LEAST_ROUNDS:
        return False
    return (interval.high - interval.low) / 2 < NARROW * comparison.speedup


def judge_interval(interval: Interval | None) -> Verdict:
    """What an interval of speedups allows to say.

    `same` where all of it is within MARGIN of 1, even if it leaves 1 out; else `faster` where all of it is above
    1, `slower` where all of it is below; else, and without an interval, `undecided`.
    """
    if interval is None:
        return "undecided"
    if interval.low >= 1 / (1 + MARGIN) and interval.high <= 1 + MARGIN:
        return "same"
    if interval.low > 1:
        return "faster"
    return "slower" if interval.high < 1 else "undecided"
