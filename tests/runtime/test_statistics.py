from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_runtime.bench.statistics import paired_speedup, summarise_latency

SAMPLES = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=150)


@given(SAMPLES, st.integers(1, 64))
def test_a_summary_is_that_of_the_statistics_module(samples: list[float], batch: int) -> None:
    latency = summarise_latency(samples, batch)
    assert latency.samples == len(samples)
    assert latency.mean_ms == pytest.approx(statistics.fmean(samples))
    assert latency.median_ms == pytest.approx(statistics.median(samples))
    assert (latency.minimum_ms, latency.maximum_ms) == (min(samples), max(samples))
    assert latency.p50_ms == pytest.approx(statistics.median(samples))
    assert latency.images_per_second == pytest.approx(1000 * batch / statistics.median(samples))


@given(st.lists(st.floats(1e-3, 1e6), min_size=100, max_size=300))
def test_percentiles_are_interpolated_linearly(samples: list[float]) -> None:
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    latency = summarise_latency(samples, 1)
    assert latency.p90_ms == pytest.approx(cuts[89])
    assert latency.p99_ms == pytest.approx(cuts[98])


@pytest.mark.parametrize(
    ("count", "p90", "p99"),
    [(1, False, False), (19, False, False), (20, True, False), (99, True, False), (100, True, True)],
)
def test_a_percentile_is_not_given_from_too_few_samples(count: int, p90: bool, p99: bool) -> None:
    latency = summarise_latency(np.arange(1.0, count + 1).tolist(), 1)
    assert (latency.p90_ms is not None, latency.p99_ms is not None) == (p90, p99)
    assert latency.p50_ms is not None


def test_a_speedup_is_the_median_of_the_rounds_ratios() -> None:
    baseline, samples = [10.0, 10.0, 40.0], [5.0, 10.0, 10.0]
    assert paired_speedup(baseline, samples) == 2.0
    assert statistics.median(baseline) / statistics.median(samples) == 1.0


def test_drift_that_hits_a_round_alike_leaves_the_speedup() -> None:
    drift = np.random.default_rng(0).uniform(1, 10, 25)
    assert paired_speedup((3 * drift).tolist(), (2 * drift).tolist()) == pytest.approx(1.5)
