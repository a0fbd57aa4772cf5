"""Statistics of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SAMPLES = {50: 1, 90: 20, 99: 100}
"""Percentile -> samples below which it is not given: at least two, or one for p99, must lie beyond it."""


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
    p99_ms: float | None
    images_per_second: float
    """Batch size over the median."""


def summarise_latency(samples_ms: Sequence[float], batch: int) -> Latency:
    """Statistics of at least one sample; percentiles are interpolated linearly (numpy's default)."""
    samples = np.asarray(samples_ms, np.float64)
    percentiles = {
        p: float(np.percentile(samples, p)) if len(samples) >= least else None for p, least in LEAST_SAMPLES.items()
    }
    median = float(np.median(samples))
    return Latency(
        samples=len(samples),
        mean_ms=float(samples.mean()),
        median_ms=median,
        minimum_ms=float(samples.min()),
        maximum_ms=float(samples.max()),
        p50_ms=percentiles[50],
        p90_ms=percentiles[90],
        p99_ms=percentiles[99],
        images_per_second=1000 * batch / median,
    )


def paired_speedup(baseline_ms: Sequence[float], samples_ms: Sequence[float]) -> float:
    """Median over rounds of baseline / sample, so that drift between rounds cancels; above 1 is faster."""
    return float(np.median(np.asarray(baseline_ms) / np.asarray(samples_ms)))
