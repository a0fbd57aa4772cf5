"""Each figure against torch in float64, and what is defined where a formula is not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from npu_runtime.artifact.schema import Tolerance
from npu_runtime.parity.metrics import ImageMetrics, Metrics, judge, measure_image, neighbours_kept, summarise
from npu_runtime.parity.profiles import PROFILES, judge_profile

Array = npt.NDArray[np.float32]
NAN, INF = float("nan"), float("inf")


def array(*rows: list[float]) -> Array:
    return np.array(rows, np.float32)


def pair(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> tuple[Array, Array]:
    """Expected numbers, and the same with an error of a tenth."""
    generator = np.random.default_rng(seed)
    expected = np.float32(scale) * generator.standard_normal(shape, np.float32)
    error = np.float32(scale / 10) * generator.standard_normal(shape, np.float32)
    return (expected + error).astype(np.float32), expected.astype(np.float32)


def by_torch(actual: Array, expected: Array) -> dict[str, float]:
    """The figures of an image [T, D], computed independently."""
    a, e = (torch.from_numpy(np.atleast_2d(x)).double() for x in (actual, expected))
    cosine = torch.linalg.vecdot(a, e) / (torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(e, dim=1))
    relative = ((a - e).abs() / e.abs()).flatten().sort().values
    kept = relative[: len(relative) - int(0.05 * len(relative))]
    k = min(5, a.shape[1])
    same = [len(set(x.tolist()) & set(y.tolist())) / k for x, y in zip(a.topk(k).indices, e.topk(k).indices)]
    return {
        "mean_cosine": cosine.mean().item(),
        "min_cosine": cosine.min().item(),
        "p01_cosine": torch.quantile(cosine, 0.01).item(),
        "relative_l2_error": (torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e)).item(),
        "max_abs_error": functional.l1_loss(a, e, reduction="none").max().item(),
        "mean_abs_error": functional.l1_loss(a, e).item(),
        "mse": functional.mse_loss(a, e).item(),
        "rmse": functional.mse_loss(a, e).sqrt().item(),
        "mean_relative_error": relative.mean().item(),
        "median_relative_error": torch.quantile(relative, 0.5).item(),
        "trimmed_relative_error": kept.mean().item(),
        "top1_agreement": (a.argmax(dim=1) == e.argmax(dim=1)).double().mean().item(),
        "top5_agreement": sum(same) / len(same),
        "nan": 0,
        "infinite": 0,
    }


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    st.sampled_from([1e-20, 1e-6, 1.0, 1e18]),
)
def test_every_figure_of_an_image_is_that_of_torch_in_float64(seed: int, shape: tuple[int, ...], scale: float) -> None:
    actual, expected = pair(seed, shape, scale)
    got = dataclasses.asdict(measure_image(actual, expected))
    for name, value in by_torch(actual, expected).items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=0 if "error" in name else 1e-12), name


def test_figures_over_images_are_the_worst_and_the_mean_as_they_are_called() -> None:
    images = [measure_image(*pair(seed, (7, 12))) for seed in range(4)]
    got = summarise(images)
    assert got.images == 4
    for name in ("max_abs_error", "min_cosine", "p01_cosine"):
        values = [getattr(image, name) for image in images]
        assert getattr(got, name) == (max(values) if name.startswith("max") else min(values))
    for name in ("mean_abs_error", "mse", "mean_cosine", "mean_relative_error", "median_relative_error",
                 "trimmed_relative_error", "top1_agreement", "top5_agreement"):  # fmt: skip
        assert getattr(got, name) == pytest.approx(np.mean([getattr(image, name) for image in images]), rel=1e-12)
    l2 = [image.relative_l2_error for image in images]
    found = (got.min_relative_l2_error, got.mean_relative_l2_error, got.max_relative_l2_error)
    assert found == pytest.approx((min(l2), np.mean(l2), max(l2)), rel=1e-12)
    assert got.rmse == pytest.approx(math.sqrt(got.mse), rel=1e-12)


def test_the_figures_over_images_of_one_shape_are_those_of_all_elements() -> None:
    pairs = [pair(seed, (7, 12)) for seed in range(4)]
    got = summarise([measure_image(a, e) for a, e in pairs])
    difference = np.stack([a.astype(np.float64) - e for a, e in pairs])
    assert got.mse == pytest.approx((difference**2).mean(), rel=1e-12)
    assert got.mean_abs_error == pytest.approx(np.abs(difference).mean(), rel=1e-12)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (1, 1), (1,)])
def test_equal_outputs_differ_by_nothing(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    got = measure_image(x, x.copy())
    assert [getattr(got, f.name) for f in dataclasses.fields(got) if "error" in f.name or "mse" in f.name] == [0.0] * 8
    assert (got.mean_cosine, got.min_cosine, got.p01_cosine) == pytest.approx((1, 1, 1), abs=1e-15)
    assert (got.top1_agreement, got.top5_agreement) == (1, 1)


@pytest.mark.parametrize(
    ("actual", "expected", "l2", "cosine", "relative"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0, 1, 0),
        ([1.0, 0.0], [0.0, 0.0], INF, 0, INF),
        ([0.0, 0.0], [2.0, 0.0], 1, 0, 0.5),
    ],
)
def test_zero_norms_are_defined(
    actual: list[float], expected: list[float], l2: float, cosine: float, relative: float
) -> None:
    got = measure_image(array(actual), array(expected))
    assert (got.relative_l2_error, got.min_cosine, got.mean_relative_error) == (l2, cosine, relative)


def test_constant_outputs_are_defined() -> None:
    ones = np.ones((4, 9), np.float32)
    got = measure_image(ones, ones)
    assert (got.top1_agreement, got.top5_agreement, got.mean_cosine) == (1, 1, pytest.approx(1))
    ramp = np.arange(9, dtype=np.float32)[None].repeat(4, axis=0)
    got = measure_image(ones, ramp)
    assert (got.top1_agreement, got.top5_agreement) == (0, 0.2)  # the lowest of equal indices: 0..4 against 4..8


def test_equal_largest_elements_are_taken_by_the_lowest_index() -> None:
    expected = np.zeros((1, 20), np.float32)
    expected[0, [3, 8, 9, 15, 16, 17]] = [5, 1, 1, 4, 1, 1]  # four share the third place
    actual = expected.copy()
    actual[0, 17] = 0
    assert measure_image(actual, expected).top5_agreement == 1
    actual[0, 8] = 0
    assert measure_image(actual, expected).top5_agreement == 0.8


def test_the_trimmed_mean_leaves_out_the_largest_twentieth() -> None:
    expected = np.ones((1, 40), np.float32)
    actual = expected.copy()
    actual[0, [4, 9]] = 100
    got = measure_image(actual, expected)
    assert (got.trimmed_relative_error, got.mean_relative_error) == (0, pytest.approx(2 * 99 / 40))
    actual[0, 20] = 2
    assert measure_image(actual, expected).trimmed_relative_error == pytest.approx(1 / 38)


def test_a_scale_that_cosine_hides_is_an_error() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    got = measure_image(2 * x, x)
    assert got.min_cosine == pytest.approx(1, abs=1e-7)
    assert got.relative_l2_error == pytest.approx(1, abs=1e-6)


def test_one_bad_vector_is_not_hidden_by_the_others() -> None:
    x = np.random.default_rng(0).standard_normal((200, 16), np.float32)
    other = x.copy()
    other[17] *= -1
    got = measure_image(other, x)
    assert got.mean_cosine > 0.98
    assert (got.min_cosine, got.p01_cosine > 0.9) == (pytest.approx(-1), True)


def test_differences_below_float32_are_not_lost() -> None:
    expected = np.array([1e4, 1.0], np.float32)
    actual = np.nextafter(expected, np.float32(np.inf))
    exact = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    assert measure_image(actual, expected).mean_abs_error == float(exact.mean())


def test_squares_beyond_float32_do_not_overflow() -> None:
    assert measure_image(array([3e38, 0.0]), array([3e38, 1e38])).relative_l2_error == pytest.approx(1 / math.sqrt(10))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["actual", "expected", "both"])
def test_what_is_not_finite_is_counted_and_passes_no_finite_limit(value: float, side: str) -> None:
    fine, broken = array([1.0, 0.0, 3, 4, 5, 6]), array([value, 0.0, 3, 4, 5, 6])
    image = measure_image(fine if side == "expected" else broken, fine if side == "actual" else broken)
    counted = (image.nan, image.infinite)
    assert counted == ((0, 0) if side == "expected" else (1, 0) if math.isnan(value) else (0, 1))
    assert (image.top1_agreement, image.top5_agreement) == (0, 0)
    limits = [Tolerance("y", metric, 1e300, "") for metric in ("max_abs_error", "max_relative_l2_error")]
    checks = judge("y", summarise([image]), limits)
    assert [check.passed for check in checks] == [False, False]
    assert all(check.reason for check in checks)
    assert not any(check.passed for check in judge_profile("y", summarise([image]), PROFILES["reports"][-2:]))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (1, 3)), ((0,), (0,)), ((2, 0), (2, 0)), ((), ())],
)
def test_arrays_that_cannot_be_compared_are_refused(actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected two arrays of one shape"):
        measure_image(np.zeros(actual, np.float32), np.zeros(expected, np.float32))


@given(st.integers(0, 2**32 - 1), st.integers(3, 12))
def test_neighbours_kept_is_what_torch_finds_by_distances(seed: int, count: int) -> None:
    actual, expected = pair(seed, (count, 6))
    nearest = min(5, count - 1)
    found = []
    for x in (actual, expected):
        unit = functional.normalize(torch.from_numpy(x).double(), dim=1)
        distance = torch.cdist(unit, unit).fill_diagonal_(torch.inf)  # grows with the angle
        found.append([set(row.tolist()) for row in distance.topk(nearest, largest=False).indices])
    shared = [len(a & e) / nearest for a, e in zip(*found)]
    assert neighbours_kept(actual, expected) == pytest.approx(sum(shared) / count)


def test_neighbours_of_few_images_and_of_zero_vectors_are_defined() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4), np.float32)
    assert neighbours_kept(x, x) is None
    assert neighbours_kept(x[:1], x[:1]) is None
    zeros = np.zeros((4, 4), np.float32)
    assert neighbours_kept(zeros, zeros) == 1


def test_a_scrambled_set_keeps_few_neighbours() -> None:
    x = np.random.default_rng(0).standard_normal((60, 8), np.float32)
    assert neighbours_kept(x, x) == 1
    kept = neighbours_kept(x[np.random.default_rng(1).permutation(60)], x)
    assert kept is not None
    assert kept < 0.3


def metrics(**values: Any) -> Metrics:
    same = measure_image(np.ones(8, np.float32), np.ones(8, np.float32))
    return dataclasses.replace(summarise([same]), **values)


@pytest.mark.parametrize(
    ("value", "passed"), [(0.0, True), (0.5, True), (np.nextafter(0.5, 1), False), (INF, False), (NAN, False)]
)
def test_a_limit_is_inclusive_and_nan_passes_none(value: float, passed: bool) -> None:
    (check,) = judge("y", metrics(max_abs_error=value), [Tolerance("y", "max_abs_error", 0.5, "")])
    assert (check.passed, check.reason is None) == (passed, passed)
    assert (check.output, check.metric, check.limit, check.comparison) == ("y", "max_abs_error", 0.5, "at most")


def test_a_reason_says_the_figure_and_the_limit() -> None:
    (check,) = judge("y", metrics(max_abs_error=0.25), [Tolerance("y", "max_abs_error", 5e-5, "")])
    assert check.reason == "0.25 is more than 5e-05"
    (check,) = judge("y", metrics(nan=3), [Tolerance("y", "max_abs_error", 5e-5, "")])
    assert check.reason == "3 values are NaN and 0 infinite"


def test_each_tolerance_of_this_output_is_judged_and_no_other() -> None:
    tolerances = [
        Tolerance("x", "max_abs_error", 0.0, ""),
        Tolerance("y", "max_abs_error", 1.0, ""),
        Tolerance("y", "max_relative_l2_error", 0.1, ""),
    ]
    checks = judge("y", metrics(max_abs_error=0.5, max_relative_l2_error=0.2), tolerances)
    assert [(c.metric, c.value, c.passed) for c in checks] == [
        ("max_abs_error", 0.5, True),
        ("max_relative_l2_error", 0.2, False),
    ]


def test_the_reports_profile_holds_each_published_criterion() -> None:
    fine = metrics()
    assert all(check.passed for check in judge_profile("y", fine, PROFILES["reports"]))
    for name, value in {
        "mean_relative_error": 0.011,
        "trimmed_relative_error": 0.011,
        "mean_cosine": 0.9989,
        "mean_abs_error": 0.011,
        "top1_agreement": 0.99,
        "top5_agreement": 0.99,
    }.items():
        failed = [c for c in judge_profile("y", metrics(**{name: value}), PROFILES["reports"]) if not c.passed]
        assert {check.metric for check in failed} == {name}
    between = judge_profile("y", metrics(mean_abs_error=0.007), PROFILES["reports"])
    assert [(c.limit, c.passed) for c in between if c.metric == "mean_abs_error"] == [(0.005, False), (0.01, True)]


def test_every_metric_has_one_meaning() -> None:
    shared = {f.name for f in dataclasses.fields(ImageMetrics)} - {"relative_l2_error"}
    assert shared <= {f.name for f in dataclasses.fields(Metrics)}
