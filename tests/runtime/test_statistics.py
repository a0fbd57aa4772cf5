from __future__ import annotations

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_runtime.bench.statistics import (
    MARGIN,
    NOISY,
    Comparison,
    Interval,
    Verdict,
    compare_apart,
    compare_paired,
    is_narrow,
    judge_interval,
    median_interval,
    summarise_latency,
)

MILLISECONDS = st.floats(1e-3, 1e6)
SAMPLES = st.lists(MILLISECONDS, min_size=1, max_size=150)


@given(SAMPLES, st.integers(1, 64))
def test_a_summary_is_that_of_the_statistics_module(samples: list[float], batch: int) -> None:
    latency = summarise_latency(samples, batch)
    assert latency.samples == len(samples)
    assert latency.mean_ms == pytest.approx(statistics.fmean(samples))
    assert latency.median_ms == pytest.approx(statistics.median(samples))
    assert (latency.minimum_ms, latency.maximum_ms) == (min(samples), max(samples))
    assert latency.p50_ms == pytest.approx(statistics.median(samples))
    assert latency.images_per_second == pytest.approx(1000 * batch / statistics.median(samples))
    if len(samples) == 1:
        assert latency.standard_deviation_ms is None
    else:
        assert latency.standard_deviation_ms == pytest.approx(statistics.stdev(samples), abs=1e-6)
        first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
        assert latency.interquartile_range_ms == pytest.approx(third - first, abs=1e-6)
        assert latency.noisy == (latency.interquartile_range_ms > NOISY * latency.median_ms)


@given(st.lists(MILLISECONDS, min_size=20, max_size=99))
def test_percentiles_of_few_samples_are_those_of_the_statistics_module(samples: list[float]) -> None:
    latency = summarise_latency(samples, 1)
    cuts = statistics.quantiles(samples, n=20, method="inclusive")
    assert latency.p90_ms == pytest.approx(cuts[17])
    assert latency.p95_ms == (pytest.approx(cuts[18]) if len(samples) >= 40 else None)
    assert latency.p99_ms is None


@given(st.lists(MILLISECONDS, min_size=100, max_size=300))
def test_percentiles_are_interpolated_linearly(samples: list[float]) -> None:
    latency = summarise_latency(samples, 1)
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    assert latency.p90_ms == pytest.approx(cuts[89])
    assert latency.p95_ms == pytest.approx(cuts[94])
    assert latency.p99_ms == pytest.approx(cuts[98])
    assert latency.interquartile_range_ms == pytest.approx(cuts[74] - cuts[24], abs=1e-6)
    levels = torch.tensor([0.25, 0.5, 0.75, 0.9, 0.95, 0.99], dtype=torch.float64)
    first, median, third, *high = torch.quantile(torch.tensor(samples, dtype=torch.float64), levels).tolist()
    assert latency.interquartile_range_ms == pytest.approx(third - first, abs=1e-6)
    assert [latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms] == pytest.approx([median, *high])


@pytest.mark.parametrize(
    ("count", "p90", "p95", "p99"),
    [
        (1, False, False, False),
        (19, False, False, False),
        (20, True, False, False),
        (39, True, False, False),
        (40, True, True, False),
        (99, True, True, False),
        (100, True, True, True),
    ],
)
def test_a_percentile_is_not_given_from_too_few_samples(count: int, p90: bool, p95: bool, p99: bool) -> None:
    latency = summarise_latency(np.arange(1.0, count + 1).tolist(), 1)
    assert [value is not None for value in (latency.p90_ms, latency.p95_ms, latency.p99_ms)] == [p90, p95, p99]
    assert latency.p50_ms is not None


def test_samples_are_labelled_noisy_above_the_bound_of_their_spread_and_none_is_dropped() -> None:
    # The quartiles of five samples are the second and the fourth.
    def spread(by: float) -> list[float]:
        return [50.0, 100 - by / 2, 100.0, 100 + by / 2, 1000.0]

    assert not summarise_latency(spread(100 * NOISY), 1).noisy
    noisy = summarise_latency(spread(100 * NOISY + 0.5), 1)
    assert noisy.noisy
    assert (noisy.samples, noisy.minimum_ms, noisy.maximum_ms) == (5, 50, 1000)
    assert not summarise_latency([3.0], 1).noisy


def coverage(count: int, k: int) -> Fraction:
    """Probability that x(k) to x(n + 1 - k) of n values of a continuous distribution hold its median."""
    return 1 - 2 * Fraction(sum(math.comb(count, i) for i in range(k)), 2**count)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.975, 0.99])
def test_an_interval_is_the_narrowest_of_its_kind_that_the_binomial_allows(confidence: float) -> None:
    for count in range(1, 200):
        interval = median_interval(list(range(1, count + 1)), confidence)
        if interval is None:
            assert coverage(count, 1) < confidence
            continue
        k = int(interval.low)
        assert interval.high == count + 1 - k
        assert coverage(count, k) >= confidence > coverage(count, k + 1)


def test_an_interval_of_095_needs_6_values() -> None:
    assert median_interval([1.0, 2, 3, 4, 5]) is None
    assert median_interval([6.0, 5, 4, 3, 2, 1]) == Interval(1, 6)
    assert median_interval([]) is None


@pytest.mark.parametrize(("count", "low", "high"), [(10, 2, 9), (20, 6, 15), (25, 8, 18), (100, 40, 61)])
def test_an_interval_has_the_ranks_of_published_tables(count: int, low: int, high: int) -> None:
    assert median_interval(list(range(1, count + 1))) == Interval(low, high)


def test_an_interval_of_many_thousand_values_is_found() -> None:
    interval = median_interval(list(range(1, 10_001)))
    assert interval is not None
    assert interval.low == pytest.approx(5000.5 - 0.98 * 100, abs=1.5)


@pytest.mark.parametrize("count", [6, 15, 40])
def test_simulated_intervals_cover_the_median_of_a_skewed_distribution(count: int) -> None:
    draws = np.exp(np.random.default_rng(count).normal(0, 0.5, (4000, count)))
    intervals = [median_interval(draw) for draw in draws.tolist()]
    covered = np.mean([interval is not None and interval.low <= 1 <= interval.high for interval in intervals])
    assert 0.945 <= covered < 0.99


def test_simulated_comparisons_of_equals_are_rarely_called_different() -> None:
    generator = np.random.default_rng(1)
    verdicts = []
    for _ in range(1000):
        drift = generator.uniform(1, 2, 30)
        one, other = (drift * np.exp(generator.normal(0, 0.2, 30)) for _ in range(2))
        verdicts.append(compare_paired(one.tolist(), other.tolist()).verdict)
    assert sum(verdict in ("faster", "slower") for verdict in verdicts) <= 0.06 * len(verdicts)


def test_simulated_intervals_of_separate_runs_cover_the_ratio_of_the_medians() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        old, new = 3 * np.exp(generator.normal(0, 0.3, 25)), 2 * np.exp(generator.normal(0, 0.1, 40))
        interval = compare_apart(old.tolist(), new.tolist()).interval
        covered += interval is not None and interval.low <= 1.5 <= interval.high
    assert covered >= 950


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.1, 1.2, "faster"),
        (1.0001, 1.2, "faster"),
        (1.0, 1.2, "undecided"),
        (0.9, 1.2, "undecided"),
        (0.8, 1.0, "undecided"),
        (0.8, 0.9999, "slower"),
        (0.5, 0.6, "slower"),
        (1 / (1 + MARGIN), 1 + MARGIN, "same"),
        (1.005, 1.015, "same"),
        (0.985, 0.995, "same"),
        (1 / (1 + MARGIN) - 1e-9, 1.0, "undecided"),
        (1.0, 1 + MARGIN + 1e-9, "undecided"),
    ],
)
def test_a_verdict_follows_from_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert judge_interval(Interval(low, high)) == verdict


def test_nothing_is_decided_without_an_interval() -> None:
    comparison = compare_paired([3.0] * 5, [1.0] * 5)
    assert (comparison.speedup, comparison.interval, comparison.verdict) == (3, None, "undecided")
    assert compare_apart([3.0] * 6, [1.0] * 100).verdict == "undecided"
    assert compare_apart([3.0] * 7, [1.0] * 7).verdict == "faster"


@given(st.lists(st.tuples(st.floats(1, 10), st.floats(1, 10)), min_size=6, max_size=60))
def test_exchanging_the_sides_turns_the_comparison_round(pairs: list[tuple[float, float]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    turned: dict[Verdict, Verdict] = {"faster": "slower", "slower": "faster"}
    for compare in (compare_paired, compare_apart):
        there, back = compare(one, other), compare(other, one)
        assert (there.interval is None) == (back.interval is None)
        if there.interval is None or back.interval is None:
            continue
        assert (back.interval.low, back.interval.high) == pytest.approx(
            (1 / there.interval.high, 1 / there.interval.low)
        )
        ends = (there.interval.low, there.interval.high)
        if not any(math.isclose(end, at) for end in ends for at in (1, 1 + MARGIN, 1 / (1 + MARGIN))):
            assert back.verdict == turned.get(there.verdict, there.verdict)


@pytest.mark.parametrize(
    ("low", "high", "rounds", "narrow"),
    [
        (1.96, 1.999, 20, True),
        (1.96, 1.999, 19, False),
        (1.96, 2.0, 20, False),
        (0.5, 4.0, 1000, False),
    ],
)
def test_an_interval_is_narrow_below_a_half_width_of_1_percent_after_20_rounds(
    low: float, high: float, rounds: int, narrow: bool
) -> None:
    assert is_narrow(Comparison(2.0, Interval(low, high), "faster"), rounds) == narrow
    assert not is_narrow(Comparison(2.0, None, "undecided"), rounds)


def test_stopping_when_the_interval_is_narrow_keeps_most_of_its_coverage() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        ratios = np.exp(generator.normal(0, 0.03, 200)).tolist()
        for rounds in range(20, 201):
            comparison = compare_paired(ratios[:rounds], [1.0] * rounds)
            if is_narrow(comparison, rounds):
                break
        interval = comparison.interval
        covered += interval is not None and interval.low <= 1 <= interval.high
    assert covered >= 0.9 * 300


@pytest.mark.parametrize(("old_count", "new_count"), [(7, 7), (8, 30), (25, 12), (60, 61)])
def test_an_interval_of_separate_runs_is_made_of_two_of_half_the_doubt(old_count: int, new_count: int) -> None:
    def ends(count: int) -> tuple[int, int]:
        """The ranks of the interval of the median, by the largest k that covers it with 0.975."""
        k = max(k for k in range(1, count // 2 + 1) if coverage(count, k) >= Fraction(975, 1000))
        return k, count + 1 - k

    old, new = [float(100 + i) for i in range(old_count)], [float(50 + 3 * i) for i in range(new_count)]
    (a, b), (c, d) = ends(old_count), ends(new_count)
    comparison = compare_apart(old[::-1], new)
    assert comparison.speedup == pytest.approx(statistics.median(old) / statistics.median(new))
    assert comparison.interval == Interval(old[a - 1] / new[d - 1], old[b - 1] / new[c - 1])


def test_an_interval_of_paired_runs_is_that_of_the_sign_test() -> None:
    generator = np.random.default_rng(4)
    for count in (6, 9, 20, 33):
        baseline, samples = generator.uniform(1, 9, (2, count))
        interval = compare_paired(baseline.tolist(), samples.tolist()).interval
        assert interval is not None
        ratios = np.sort(baseline / samples)
        for speedup in (*(ratios[:-1] + ratios[1:]) / 2, ratios[0] / 2, ratios[-1] * 2):
            slower = int((ratios < speedup).sum())
            extreme = min(slower, count - slower)
            p_value = min(Fraction(1), 2 * sum(Fraction(math.comb(count, i), 2**count) for i in range(extreme + 1)))
            assert (interval.low <= speedup <= interval.high) == (p_value > Fraction(5, 100))


def test_a_speedup_is_the_median_of_the_rounds_ratios() -> None:
    baseline, samples = [10.0, 10.0, 40.0], [5.0, 10.0, 10.0]
    assert compare_paired(baseline, samples).speedup == 2.0
    assert compare_apart(baseline, samples).speedup == 1.0


def test_drift_that_hits_a_round_alike_leaves_the_comparison() -> None:
    drift = np.random.default_rng(0).uniform(1, 10, 25)
    comparison = compare_paired((3 * drift).tolist(), (2 * drift).tolist())
    assert comparison.speedup == pytest.approx(1.5)
    assert comparison.interval is not None
    assert (comparison.interval.low, comparison.interval.high) == pytest.approx((1.5, 1.5))
    assert comparison.verdict == "faster"
    assert compare_apart((3 * drift).tolist(), (2 * drift).tolist()).verdict == "undecided"
