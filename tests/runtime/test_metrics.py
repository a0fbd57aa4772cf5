from __future__ import annotations

import math
from dataclasses import astuple, fields, replace
from typing import get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from npu_runtime.artifact.schema import Tolerance
from npu_runtime.parity.metrics import (
    Comparison,
    ImageMetrics,
    Metrics,
    check,
    judge,
    measure_image,
    neighbours_kept,
    summarise,
)
from npu_runtime.parity.profiles import REPORTS, Criterion, Profile, judge_profile

Array = npt.NDArray[np.float32]
NAN, INF = float("nan"), float("inf")

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.sampled_from([1e-20, 1e-6, 1.0, 1e4, 1e18])
NOISES = st.sampled_from([1e-6, 1e-2, 1.0])
NOT_A_NUMBER = ("top1_agreement", "top5_agreement", "nan", "infinite", "images")
"""Figures that stay numbers where the arrays do not."""


def array(*rows: list[float]) -> Array:
    return np.array(rows, np.float32)


def pair(seed: int, shape: tuple[int, ...], scale: float = 1.0, noise: float = 1e-2) -> tuple[Array, Array]:
    """An output and the expected one, which differ by `noise` of their scale; no two elements are equal."""
    generator = np.random.default_rng(seed)
    expected = (scale * generator.standard_normal(shape)).astype(np.float32)
    actual = (expected + scale * noise * generator.standard_normal(shape)).astype(np.float32)
    return actual, expected


def in_torch(actual: Array, expected: Array) -> dict[str, float]:
    """The figures of two finite arrays [T, D] without zeros or equal elements, computed by torch in float64."""
    a, e = torch.from_numpy(actual).double(), torch.from_numpy(expected).double()
    cosine = cosine_similarity(a, e, dim=-1, eps=0)
    relative = ((a - e) / e).abs().flatten()
    drop = math.floor(0.05 * relative.numel())
    k = min(5, a.shape[-1])
    ours, theirs = (torch.topk(x, k, dim=-1).indices.tolist() for x in (a, e))
    return {
        "mean_cosine": float(cosine.mean()),
        "min_cosine": float(cosine.min()),
        "p01_cosine": float(torch.quantile(cosine, 0.01)),
        "relative_l2_error": float(torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e)),
        "max_abs_error": float(torch.dist(a, e, p=math.inf)),
        "mean_abs_error": float(torch.nn.functional.l1_loss(a, e)),
        "mse": float(torch.nn.functional.mse_loss(a, e)),
        "rmse": float(torch.nn.functional.mse_loss(a, e).sqrt()),
        "mean_relative_error": float(relative.mean()),
        "median_relative_error": float(torch.quantile(relative, 0.5)),
        "trimmed_relative_error": float(relative.sort(descending=True).values[drop:].mean()),
        "top1_agreement": float((a.argmax(-1) == e.argmax(-1)).double().mean()),
        "top5_agreement": float(np.mean([len({*x} & {*y}) / k for x, y in zip(ours, theirs)])),
        "nan": 0,
        "infinite": 0,
        **scaled_in_torch(a, e),
    }


def scaled_in_torch(a: torch.Tensor, e: torch.Tensor) -> dict[str, float]:
    sizes = torch.quantile(e.abs(), 0.5, dim=0)
    scaled = (a - e).abs() / torch.maximum(e.abs(), torch.maximum(sizes, torch.quantile(sizes, 0.5)))
    return {"max_scaled_error": float(scaled.max()), "scaled_rmse": float(scaled.square().mean().sqrt())}


def figures(metrics: ImageMetrics | Metrics) -> dict[str, float]:
    return {field.name: getattr(metrics, field.name) for field in fields(metrics)}


@given(SEEDS, st.integers(1, 9), st.integers(1, 40), SCALES, NOISES)
def test_figures_of_an_image_are_those_of_torch(seed: int, t: int, d: int, scale: float, noise: float) -> None:
    actual, expected = pair(seed, (t, d), scale, noise)
    assert figures(measure_image(actual, expected)) == pytest.approx(in_torch(actual, expected), rel=1e-6, abs=0)


@given(SEEDS, st.integers(1, 3), st.integers(1, 40))
def test_the_median_and_what_is_trimmed_follow_the_number_of_elements(seed: int, t: int, d: int) -> None:
    expected = np.ones((t, d), np.float32)
    actual = expected + np.random.default_rng(seed).permutation(t * d).reshape(t, d).astype(np.float32)
    metrics = measure_image(actual, expected)
    kept = t * d - t * d // 20
    assert metrics.median_relative_error == (t * d - 1) / 2
    assert metrics.trimmed_relative_error == pytest.approx((kept - 1) / 2, rel=1e-15)


@given(SEEDS, st.integers(1, 9), st.integers(1, 40), SCALES)
def test_equal_outputs_differ_by_nothing(seed: int, t: int, d: int, scale: float) -> None:
    x, _ = pair(seed, (t, d), scale)
    assert astuple(measure_image(x, x.copy())) == (1, 1, 1, *[0] * 8, 1, 1, 0, 0, 0, 0)


@given(SEEDS, st.integers(1, 9), SCALES, NOISES)
def test_an_embedding_is_one_vector(seed: int, d: int, scale: float, noise: float) -> None:
    actual, expected = pair(seed, (d,), scale, noise)
    metrics = measure_image(actual, expected)
    assert metrics == measure_image(actual[None], expected[None])
    assert metrics.mean_cosine == metrics.min_cosine == metrics.p01_cosine
    assert metrics.top1_agreement in (0, 1)


def test_arrays_are_read_only_read_and_may_have_gaps() -> None:
    actual, expected = pair(0, (6, 8))
    metrics = measure_image(actual[::2, ::2].copy(), expected[::2, ::2].copy())
    for x in (actual, expected):
        x.setflags(write=False)
    assert measure_image(actual[::2, ::2], expected[::2, ::2]) == metrics


def test_a_scale_that_cosine_hides_is_an_error() -> None:
    _, x = pair(0, (3, 5))
    metrics = measure_image(2 * x, x)
    assert (metrics.min_cosine, metrics.top5_agreement, metrics.relative_l2_error) == (1, 1, 1)


@given(SEEDS, st.floats(0.1, 10), st.sampled_from([-1, 1]))
def test_rounding_takes_no_cosine_beyond_one(seed: int, factor: float, sign: int) -> None:
    _, x = pair(seed, (20, 7))
    metrics = measure_image(np.float32(sign * factor) * x, x)
    assert -1 <= metrics.min_cosine <= metrics.mean_cosine <= 1
    assert metrics.mean_cosine == pytest.approx(sign, abs=1e-12)


def test_one_wrong_vector_shows_in_the_least_cosine_and_not_in_the_first_percentile_of_many() -> None:
    expected = np.ones((201, 2), np.float32)
    actual = expected.copy()
    actual[7] = [1, -1]
    metrics = measure_image(actual, expected)
    assert (metrics.min_cosine, metrics.p01_cosine) == (0, 1)
    assert metrics.mean_cosine == pytest.approx(200 / 201)


def test_differences_below_float32_are_not_lost() -> None:
    expected = array([1e4, 1.0])
    actual = np.nextafter(expected, np.float32(np.inf))
    exact = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    assert measure_image(actual, expected).mean_abs_error == float(exact.mean())


def test_squares_beyond_float32_do_not_overflow() -> None:
    metrics = measure_image(array([3e38, 0.0]), array([3e38, 1e38]))
    assert metrics.relative_l2_error == pytest.approx(1 / math.sqrt(10))
    assert metrics.min_cosine == pytest.approx(3 / math.sqrt(10))


def test_squares_below_float32_do_not_vanish() -> None:
    least = float(np.finfo(np.float32).smallest_subnormal)
    metrics = measure_image(array([least, 0.0]), array([least, least]))
    assert metrics.min_cosine == pytest.approx(1 / math.sqrt(2))
    assert metrics.relative_l2_error == pytest.approx(1 / math.sqrt(2))
    assert metrics.mse == least**2 / 2 > 0


@pytest.mark.parametrize(
    ("actual", "expected", "l2", "relative", "cosine"),
    [([0.0, 0.0], [0.0, 0.0], 0, 0, 1), ([1.0, 0.0], [0.0, 0.0], INF, INF, 0), ([0.0, 0.0], [2.0, 2.0], 1, 1, 0)],
)
def test_zero_norms_are_defined(
    actual: list[float], expected: list[float], l2: float, relative: float, cosine: float
) -> None:
    metrics = measure_image(array(actual), array(expected))
    assert (metrics.relative_l2_error, metrics.mean_relative_error, metrics.min_cosine) == (l2, relative, cosine)


def test_a_zero_that_became_something_is_infinitely_wrong_unless_it_is_trimmed() -> None:
    expected = np.ones((1, 20), np.float32)
    expected[0, 3] = 0
    actual = expected.copy()
    actual[0, 3] = 1e-6
    metrics = measure_image(actual, expected)
    assert (metrics.mean_relative_error, metrics.median_relative_error, metrics.trimmed_relative_error) == (INF, 0, 0)
    metrics = measure_image(actual[:, :19], expected[:, :19])
    assert metrics.trimmed_relative_error == INF


def test_constant_outputs_agree_in_their_lowest_indices() -> None:
    metrics = measure_image(np.full((3, 8), 2, np.float32), np.full((3, 8), 1, np.float32))
    assert astuple(metrics) == (1, 1, 1, *[1] * 8, 1, 1, 0, 0, 1, 1)


@pytest.mark.parametrize(
    ("actual", "expected", "top1", "top5"),
    [
        ([9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], 1, 1),
        ([8, 9, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], 0, 1),  # the order within the five is not asked for
        ([9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 3, 4, 5], 1, 0.8),
        ([0, 0, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 0, 0], 0, 0.6),
        ([9, 9, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], 1, 1),  # of two equal, the first
        ([9, 9, 7, 6, 5, 4, 3], [8, 9, 7, 6, 5, 4, 3], 0, 1),
        ([9, 8, 7, 6, 4, 4, 4], [9, 8, 7, 6, 5, 4, 3], 1, 1),
        ([9, 8, 7, 6, 4, 4, 4], [9, 8, 7, 6, 3, 4, 5], 1, 0.8),
        ([0.0, -0.0, -1, -2, -3, -4, -5], [-0.0, 0.0, -1, -2, -3, -4, -5], 1, 1),
        ([2, 1], [1, 2], 0, 1),
        ([3], [-1], 1, 1),
    ],
)
def test_the_largest_elements_agree_where_their_indices_do(
    actual: list[float], expected: list[float], top1: float, top5: float
) -> None:
    metrics = measure_image(array(actual), array(expected))
    assert (metrics.top1_agreement, metrics.top5_agreement) == (top1, top5)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((2, 3), (2, 3, 1)), ((3,), (1, 3)), ((1, 2, 3), (1, 2, 3)), ((), ())]
    + [((0, 3), (0, 3)), ((2, 0), (2, 0)), ((0,), (0,))],
)
def test_arrays_that_cannot_be_compared_are_refused(actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected two arrays of one shape"):
        measure_image(np.zeros(actual, np.float32), np.zeros(expected, np.float32))


@given(
    SEEDS,
    st.integers(1, 4),
    st.integers(1, 30),
    st.lists(st.tuples(st.sampled_from("ae"), st.integers(0, 119), st.sampled_from([NAN, INF, -INF])), min_size=1),
)
def test_what_is_not_finite_is_counted_and_passes_no_limit(
    seed: int, t: int, d: int, breaks: list[tuple[str, int, float]]
) -> None:
    actual, expected = pair(seed, (t, d), noise=0)
    for side, at, value in breaks:
        (actual if side == "a" else expected).ravel()[at % (t * d)] = value
    image = measure_image(actual, expected)
    assert image.nan == np.isnan(actual).sum()
    assert image.infinite == np.isinf(actual).sum()
    broken = ~(np.isfinite(actual) & np.isfinite(expected)).all(axis=1)
    assert image.top1_agreement == image.top5_agreement == pytest.approx(1 - broken.mean())
    metrics = summarise([measure_image(np.ones_like(actual), np.ones_like(actual)), image])
    for values in (figures(image), figures(metrics)):
        assert all(math.isnan(value) for name, value in values.items() if name not in NOT_A_NUMBER)
    for name in figures(metrics):
        assert not check("y", metrics, name, "at most", 1e300).passed
        assert not check("y", metrics, name, "at least", -1e300).passed
    assert not any(check.passed for check in judge_profile("y", metrics, REPORTS))


@given(SEEDS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 30), NOISES)
def test_a_summary_is_of_the_figures_of_its_images(seed: int, n: int, t: int, d: int, noise: float) -> None:
    actual, expected = pair(seed, (n, t, d), noise=noise)
    images = [in_torch(a, e) for a, e in zip(actual, expected)]
    of = {name: torch.tensor([image[name] for image in images], dtype=torch.float64) for name in images[0]}
    same = ("mean_abs_error", "mse", "mean_cosine", "mean_relative_error", "median_relative_error")
    assert figures(summarise([*map(measure_image, actual, expected)])) == pytest.approx(
        {
            **{name: float(of[name].mean()) for name in same},
            "images": n,
            "max_abs_error": float(of["max_abs_error"].max()),
            "rmse": float(of["mse"].mean().sqrt()),
            "min_relative_l2_error": float(of["relative_l2_error"].min()),
            "mean_relative_l2_error": float(of["relative_l2_error"].mean()),
            "max_relative_l2_error": float(of["relative_l2_error"].max()),
            "min_cosine": float(of["min_cosine"].min()),
            "p01_cosine": float(of["p01_cosine"].min()),
            "trimmed_relative_error": float(of["trimmed_relative_error"].mean()),
            "top1_agreement": float(of["top1_agreement"].mean()),
            "top5_agreement": float(of["top5_agreement"].mean()),
            "nan": 0,
            "infinite": 0,
            "max_scaled_error": float(of["max_scaled_error"].max()),
            "max_scaled_rmse": float(of["scaled_rmse"].max()),
        },
        rel=1e-6,
        abs=0,
    )


def test_the_summary_of_one_image_is_that_image() -> None:
    image = measure_image(*pair(0, (3, 30)))
    metrics = figures(summarise([image]))
    assert metrics.pop("images") == 1
    assert metrics.pop("max_scaled_rmse") == image.scaled_rmse
    l2 = [metrics.pop(f"{which}_relative_l2_error") for which in ("min", "mean", "max")]
    assert l2 == [image.relative_l2_error] * 3
    assert metrics == pytest.approx({name: v for name, v in figures(image).items() if name in metrics}, rel=1e-15)


def test_the_worst_image_and_the_worst_vector_stand_for_all() -> None:
    expected = np.ones((3, 2, 4), np.float32)
    actual = expected.copy()
    actual[1, 1] = [1, -1, 1, -1]
    metrics = summarise([*map(measure_image, actual, expected)])
    assert (metrics.max_abs_error, metrics.mean_abs_error) == (2, 4 / 24)
    assert (metrics.max_relative_l2_error, metrics.min_relative_l2_error) == (1, 0)
    assert metrics.min_cosine == 0
    assert metrics.mean_cosine == pytest.approx(5 / 6)


def test_counts_are_summed_over_images() -> None:
    broken = measure_image(array([NAN, NAN, INF, 0.0]), np.zeros((1, 4), np.float32))
    metrics = summarise([broken, broken])
    assert (metrics.nan, metrics.infinite, metrics.nonfinite) == (4, 2, 6)


def test_a_summary_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        summarise([])


@given(SEEDS, st.integers(3, 12), st.integers(2, 20), SCALES, NOISES, st.integers(1, 6))
def test_neighbours_are_those_of_torchs_distances_on_the_sphere(
    seed: int, n: int, d: int, scale: float, noise: float, k: int
) -> None:
    actual, expected = pair(seed, (n, d), scale, noise)
    k = min(k, n - 2)

    def nearest(x: Array) -> list[set[int]]:
        on_sphere = torch.nn.functional.normalize(torch.from_numpy(x).double(), dim=-1, eps=0)
        distance = torch.cdist(on_sphere, on_sphere, compute_mode="donot_use_mm_for_euclid_dist")
        distance.fill_diagonal_(math.inf)
        return [{*row} for row in torch.topk(distance, k, largest=False).indices.tolist()]

    shares = [len(a & e) / k for a, e in zip(nearest(actual), nearest(expected))]
    assert neighbours_kept(actual, expected, k) == pytest.approx(np.mean(shares), rel=1e-12, abs=0)


def test_an_image_that_moved_to_others_loses_its_neighbours() -> None:
    expected = array([1, 0], [1, 0.1], [0, 1], [0.1, 1])
    actual = array([-0.2, 1], [1, 0.1], [0, 1], [0.1, 1])
    assert neighbours_kept(expected, expected, k=1) == 1
    assert neighbours_kept(actual, expected, k=1) == 0.5  # the first two were each other's


def test_lengths_do_not_matter_to_neighbours() -> None:
    _, expected = pair(0, (9, 7))
    actual = expected * np.float32(2) ** np.arange(9, dtype=np.float32)[:, None]
    assert neighbours_kept(actual, expected, k=2) == 1


@given(SEEDS, st.integers(1, 70), st.integers(3, 40))
def test_of_equally_near_images_the_first_are_neighbours(seed: int, d: int, n: int) -> None:
    x = np.repeat(np.random.default_rng(seed).standard_normal((1, d), np.float32), n, axis=0)
    far = x.copy()
    far[-1] *= -1
    assert neighbours_kept(x, x, k=1) == 1
    # The first has the second and the rest have the first, the one that is as far from all among them.
    assert neighbours_kept(far, x, k=1) == 1


def test_zero_embeddings_are_near_each_other_alone() -> None:
    zeros = array([0, 0], [1, 1], [0, 0], [1, 2])
    assert neighbours_kept(zeros, array([3, 3], [1, 0], [3, 3], [1, 0.1]), k=1) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_images_have_no_neighbours_to_choose(n: int) -> None:
    actual, expected = pair(0, (n, 4))
    assert neighbours_kept(actual, expected) is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_neighbours_of_what_is_not_finite_are_nan(value: float) -> None:
    actual, expected = pair(0, (9, 4))
    broken = actual.copy()
    broken[3, 2] = value
    for kept in (neighbours_kept(broken, expected), neighbours_kept(actual, broken)):
        assert kept is not None
        assert math.isnan(kept)


@pytest.mark.parametrize(
    ("actual", "expected", "k"), [((3, 4), (3, 5), 1), ((3,), (3,), 1), ((3, 0), (3, 0), 1), ((3, 4), (3, 4), 0)]
)
def test_embeddings_without_neighbours_are_refused(actual: tuple[int, ...], expected: tuple[int, ...], k: int) -> None:
    with pytest.raises(ValueError, match="expected two arrays of one shape"):
        neighbours_kept(np.zeros(actual, np.float32), np.zeros(expected, np.float32), k)


EXACT = summarise([measure_image(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))])


@pytest.mark.parametrize(
    ("value", "passed"), [(0.0, True), (0.5, True), (np.nextafter(0.5, 1), False), (INF, False), (NAN, False)]
)
def test_a_limit_is_inclusive_and_nan_passes_none(value: float, passed: bool) -> None:
    (found,) = judge("y", replace(EXACT, max_abs_error=value), [Tolerance("y", "max_abs_error", 0.5, "")])
    assert (found.passed, found.reason is None) == (passed, passed)
    assert (found.output, found.metric, found.limit, found.comparison) == ("y", "max_abs_error", 0.5, "at most")


@pytest.mark.parametrize(("value", "passed"), [(1.0, True), (0.5, True), (np.nextafter(0.5, 0), False), (NAN, False)])
def test_a_limit_from_below_is_inclusive_and_nan_passes_none(value: float, passed: bool) -> None:
    profile = Profile("half", (Criterion("mean_cosine", "at least", 0.5),))
    (found,) = judge_profile("y", replace(EXACT, mean_cosine=value), profile)
    assert (found.passed, found.reason is None) == (passed, passed)
    assert found.comparison == "at least"


def test_each_tolerance_of_this_output_is_judged_and_no_other() -> None:
    tolerances = [
        Tolerance("x", "max_abs_error", 0.0, ""),
        Tolerance("y", "max_abs_error", 1.0, ""),
        Tolerance("y", "max_relative_l2_error", 0.1, ""),
    ]
    checks = judge("y", replace(EXACT, max_abs_error=0.5, max_relative_l2_error=0.2), tolerances)
    assert [(c.metric, c.value, c.passed) for c in checks] == [
        ("max_abs_error", 0.5, True),
        ("max_relative_l2_error", 0.2, False),
    ]


@pytest.mark.parametrize(
    ("changes", "comparison", "limit", "reason"),
    [
        ({"mse": 3.1e-3}, "at most", 5e-5, "0.0031 is more than 5e-05"),
        ({"mse": 1.00001e-5}, "at most", 1e-5, "1.00001e-05 is more than 1e-05"),
        ({"mse": float(np.nextafter(0.5, 1))}, "at most", 0.5, "0.5000000000000001 is more than 0.5"),
        ({"mse": INF}, "at most", 0.5, "inf is more than 0.5"),
        ({"mse": 0.9999}, "at least", 1.0, "0.9999 is less than 1"),
        ({"nan": 12}, "at most", 1.0, "12 values are NaN"),
        ({"nan": 1, "infinite": 2}, "at most", 1.0, "1 value is NaN, 2 values are infinite"),
        ({"max_abs_error": NAN}, "at most", 1.0, "the expected values are not all finite"),
        ({"mse": 1.0}, "at most", 1.0, None),
    ],
)
def test_a_failed_check_says_why(
    changes: dict[str, float], comparison: Comparison, limit: float, reason: str | None
) -> None:
    found = check("y", replace(EXACT, **changes), "mse", comparison, limit)  # type: ignore[arg-type]
    assert (found.reason, found.passed) == (reason, reason is None)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["more", "less"]))
def test_a_reason_shows_the_value_beyond_the_limit(value: float, limit: float, than: str) -> None:
    comparison: Comparison = "at most" if than == "more" else "at least"
    reason = check("y", replace(EXACT, mse=value), "mse", comparison, limit).reason
    assert (reason is None) == (value <= limit if than == "more" else value >= limit)
    if reason is not None:
        spelled = float(reason.split(f" is {than} than ")[0])
        assert spelled > limit if than == "more" else spelled < limit


def test_exact_outputs_keep_the_criteria_of_the_reports() -> None:
    checks = judge_profile("y", EXACT, REPORTS)
    assert [(c.metric, c.comparison, c.limit) for c in checks] == [
        (c.metric, c.comparison, c.limit) for c in REPORTS.criteria
    ]
    assert all(c.passed and c.output == "y" for c in checks)


@pytest.mark.parametrize("criterion", REPORTS.criteria, ids=lambda c: f"{c.metric}-{c.limit}")
def test_each_criterion_of_the_reports_can_fail(criterion: Criterion) -> None:
    beyond = math.nextafter(criterion.limit, INF if criterion.comparison == "at most" else -INF)
    checks = judge_profile("y", replace(EXACT, **{criterion.metric: beyond}), REPORTS)  # type: ignore[arg-type]
    failed = {(c.metric, c.limit) for c in checks if not c.passed}
    assert (criterion.metric, criterion.limit) in failed
    assert {metric for metric, _ in failed} == {criterion.metric}


def test_every_metric_that_a_limit_can_name_is_measured() -> None:
    known = {field.name for field in fields(Metrics)}
    for kind in (Tolerance, Criterion):
        assert set(get_args(get_type_hints(kind)["metric"])) <= known
