from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_runtime.parity.sketch import WIDTH, norm_rows, relative_errors, sketch_rows

SHAPE = (2, 17, 64)


def estimate(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return relative_errors(sketch_rows(actual), sketch_rows(expected), norm_rows(expected))


def exact(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    difference = (actual.astype(np.float64) - expected).reshape(len(actual), -1)
    return np.asarray(np.linalg.norm(difference, axis=1) / norm_rows(expected))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(slice(None), slice(None)), (3, slice(None)), (slice(None), 5), (slice(2, 4), slice(8)), (0, 0)]),
    st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
)
def test_the_estimate_is_near_the_error_wherever_that_lies(
    seed: int, where: tuple[int | slice, int | slice], size: float
) -> None:
    numbers = np.random.default_rng(seed)
    expected = numbers.standard_normal(SHAPE)
    actual = expected.copy()
    token, channel = where
    actual[:, token, channel] += size * numbers.standard_normal(actual[:, token, channel].shape)
    np.testing.assert_allclose(estimate(actual, expected), exact(actual, expected), rtol=0.3)


def test_the_error_of_one_element_is_exact() -> None:
    expected = np.ones(SHAPE)
    actual = expected.copy()
    actual[1, 4, 7] += 0.5
    np.testing.assert_allclose(estimate(actual, expected), exact(actual, expected), rtol=1e-12)
    assert estimate(actual, expected)[0] == 0


def test_elements_in_another_order_are_an_error() -> None:
    expected = np.random.default_rng(0).standard_normal((1, 8, 8))
    assert estimate(expected.transpose(0, 2, 1), expected)[0] > 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_gives_none(value: float) -> None:
    expected = np.ones(SHAPE, np.float32)
    actual = expected.copy()
    actual[0, 0, 0] = value
    errors = estimate(actual, expected)
    assert not np.isfinite(errors[0])
    assert errors[1] == 0


def test_a_zero_tensor_is_nearest_to_itself_alone() -> None:
    zero = np.zeros(SHAPE)
    assert estimate(zero, zero).tolist() == [0, 0]
    assert estimate(zero + 1e-9, zero).tolist() == [np.inf, np.inf]


def test_buckets_are_the_same_in_every_version_of_numpy() -> None:
    """As numpy 1.26 and 2.4 gave them."""
    sketch = sketch_rows(np.arange(1.0, 1001.0)[None])
    assert sketch.shape == (1, WIDTH)
    assert sketch[0, :4].tolist() == [1743.0, -1114.0, 649.0, -551.0]
