from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_runtime.artifact.schema import Tolerance
from npu_runtime.parity.metrics import Metrics, compare, judge

Array = npt.NDArray[np.float32]
NAN, INF = float("nan"), float("inf")


def array(*rows: list[float]) -> Array:
    return np.array(rows, np.float32)


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from([1e-20, 1e-6, 1.0, 1e18]),
)
def test_metrics_are_those_of_torch_in_float64(seed: int, shape: list[int], scale: float) -> None:
    generator = np.random.default_rng(seed)
    actual, expected = (np.float32(scale) * generator.standard_normal((2, *shape), np.float32)).astype(np.float32)
    a, e = (torch.from_numpy(x).double() for x in (actual, expected))
    relative = torch.linalg.vector_norm((a - e).flatten(1), dim=1) / torch.linalg.vector_norm(e.flatten(1), dim=1)
    metrics = compare(actual, expected)
    assert metrics.max_abs_error == pytest.approx(float((a - e).abs().max()), rel=1e-12)
    assert metrics.mean_abs_error == pytest.approx(float((a - e).abs().mean()), rel=1e-12)
    assert metrics.max_relative_l2_error == pytest.approx(float(relative.max()), rel=1e-12)
    cosine = (a * e).sum(-1) / (a.norm(dim=-1) * e.norm(dim=-1))
    assert metrics.min_cosine == pytest.approx(float(cosine.min()), rel=1e-12, abs=1e-12)
    assert metrics.nonfinite == 0


def test_the_worst_image_and_the_worst_vector_stand_for_all() -> None:
    expected = np.ones((3, 2, 4), np.float32)
    actual = expected.copy()
    actual[1, 1] = [1, -1, 1, -1]
    metrics = compare(actual, expected)
    assert metrics == Metrics(2.0, 4 / 24, math.sqrt(8) / math.sqrt(8), 0.0, 0)


def test_equal_arrays_differ_by_nothing() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    metrics = compare(x, x.copy())
    assert (metrics.max_abs_error, metrics.mean_abs_error, metrics.max_relative_l2_error) == (0, 0, 0)
    assert metrics.min_cosine == pytest.approx(1, abs=1e-15)


def test_a_scale_that_cosine_hides_is_an_error() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    metrics = compare(2 * x, x)
    assert metrics.min_cosine == pytest.approx(1, abs=1e-7)
    assert metrics.max_relative_l2_error == pytest.approx(1, abs=1e-6)


def test_differences_below_float32_are_not_lost() -> None:
    expected = array([1e4, 1.0])
    actual = np.nextafter(expected, np.float32(np.inf))
    exact = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    assert compare(actual, expected).mean_abs_error == float(exact.mean())


def test_squares_beyond_float32_do_not_overflow() -> None:
    metrics = compare(array([3e38, 0.0]), array([3e38, 1e38]))
    assert metrics.max_relative_l2_error == pytest.approx(1 / math.sqrt(10))


@pytest.mark.parametrize(
    ("actual", "expected", "relative", "cosine"),
    [([0.0, 0.0], [0.0, 0.0], 0, 1), ([1.0, 0.0], [0.0, 0.0], INF, 0), ([0.0, 0.0], [2.0, 0.0], 1, 0)],
)
def test_zero_norms_are_defined(actual: list[float], expected: list[float], relative: float, cosine: float) -> None:
    metrics = compare(array(actual), array(expected))
    assert (metrics.max_relative_l2_error, metrics.min_cosine) == (relative, cosine)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["actual", "expected", "both"])
def test_what_is_not_finite_is_counted_and_passes_no_finite_limit(value: float, side: str) -> None:
    fine, broken = array([1.0, 0.0], [1.0, 2.0]), array([1.0, 0.0], [value, 0.0])
    metrics = compare(fine if side == "expected" else broken, fine if side == "actual" else broken)
    assert metrics.nonfinite == (0 if side == "expected" else 1)
    limits = [Tolerance("y", metric, 1e300, "") for metric in ("max_abs_error", "max_relative_l2_error")]
    assert [check.passed for check in judge("y", metrics, limits)] == [False, False]


@pytest.mark.parametrize(
    ("actual", "expected"),
    [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((2, 3), (2, 3, 1)), ((3,), (3,)), ((0, 3), (0, 3)), ((2, 0), (2, 0))],
)
def test_arrays_that_cannot_be_compared_are_refused(actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected two arrays of one shape"):
        compare(np.zeros(actual, np.float32), np.zeros(expected, np.float32))


def metrics_with(*, max_abs_error: float = 0, max_relative_l2_error: float = 0) -> Metrics:
    return Metrics(max_abs_error, 0, max_relative_l2_error, 1, nonfinite=0)


@pytest.mark.parametrize(
    ("value", "passed"), [(0.0, True), (0.5, True), (np.nextafter(0.5, 1), False), (INF, False), (NAN, False)]
)
def test_a_limit_is_inclusive_and_nan_passes_none(value: float, passed: bool) -> None:
    (check,) = judge("y", metrics_with(max_abs_error=value), [Tolerance("y", "max_abs_error", 0.5, "")])
    assert check.passed is passed
    assert (check.output, check.metric, check.limit) == ("y", "max_abs_error", 0.5)


def test_values_that_are_not_finite_pass_no_limit_at_all() -> None:
    metrics = Metrics(0.0, 0.0, 0.0, 1.0, nonfinite=1)
    (check,) = judge("y", metrics, [Tolerance("y", "max_abs_error", 1.0, "")])
    assert not check.passed


def test_each_tolerance_of_this_output_is_judged_and_no_other() -> None:
    tolerances = [
        Tolerance("x", "max_abs_error", 0.0, ""),
        Tolerance("y", "max_abs_error", 1.0, ""),
        Tolerance("y", "max_relative_l2_error", 0.1, ""),
    ]
    checks = judge("y", metrics_with(max_abs_error=0.5, max_relative_l2_error=0.2), tolerances)
    assert [(c.metric, c.value, c.passed) for c in checks] == [
        ("max_abs_error", 0.5, True),
        ("max_relative_l2_error", 0.2, False),
    ]
