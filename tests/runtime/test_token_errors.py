from __future__ import annotations

import math

import numpy as np
import pytest

from npu_runtime.artifact.schema import TensorSpec, TokenGroup
from npu_runtime.parity.measure import Measurement
from npu_runtime.parity.token_errors import PERCENTS, TokenErrors, measure_tokens, summarise_tokens

GROUPS = (TokenGroup("cls", 0, 1), TokenGroup("patches", 1, 6))
SPECS = (TensorSpec("embedding", "float32", ("B", 8)), TensorSpec("tokens", "float32", ("B", 6, 8), GROUPS))


def test_the_error_of_a_token_is_that_of_its_own_row() -> None:
    generator = np.random.default_rng(0)
    expected = generator.standard_normal((7, 5)).astype(np.float32)
    actual = expected + generator.standard_normal((7, 5)).astype(np.float32) * np.float32(1e-3)
    for a, e, error in zip(actual.tolist(), expected.tolist(), measure_tokens(actual, expected)):
        alone = math.dist(a, e) / math.hypot(*e)
        assert error == pytest.approx(alone, rel=1e-12)


def test_zeros_and_what_is_not_finite_have_a_defined_error() -> None:
    expected = np.array([[0, 0], [0, 0], [1, 2], [1, np.inf], [1, 1]], np.float32)
    actual = np.array([[0, 0], [1, 0], [np.nan, 2], [1, np.inf], [1, 1]], np.float32)
    assert measure_tokens(actual, expected).tolist() == [0, math.inf, math.inf, math.inf, 0]


@pytest.mark.parametrize("count", [1, 2, 19, 20, 100, 197])
def test_a_quantile_is_the_least_error_that_so_many_tokens_do_not_exceed(count: int) -> None:
    errors = np.random.default_rng(count).exponential(size=(3, count))
    summary = summarise_tokens(list(errors))
    every = sorted(errors.ravel().tolist())
    for percent, quantile in zip(PERCENTS, summary.quantiles):
        # From the definition, by counting; the least of all where no token need be below.
        assert quantile == next(e for e in every if 100 * sum(other <= e for other in every) >= percent * len(every))
    assert summary.tokens == 3 * count
    assert errors[summary.worst_image, summary.worst_token] == max(every) == summary.quantiles[-1]


def test_infinite_errors_stay_infinite_and_leave_the_others() -> None:
    errors = [np.array([0.1, math.inf]), np.array([0.2, 0.3])]
    summary = summarise_tokens(errors)
    assert summary == TokenErrors(4, (0.1, 0.1, 0.1, 0.1, 0.2, 0.3, math.inf, math.inf, math.inf), 1, 0)


def test_tokens_are_summarised_by_kind_and_embeddings_are_not() -> None:
    expected = {spec.name: np.ones(spec.of_batch(3), np.float32) for spec in SPECS}
    actual = {name: array.copy() for name, array in expected.items()}
    actual["tokens"][2, 4] += 0.5  # a patch, the fourth of its kind
    actual["tokens"][1, 0] += 0.25  # CLS
    measurement = Measurement(SPECS)
    measurement.add({n: a[:2] for n, a in actual.items()}, {n: e[:2] for n, e in expected.items()})
    measurement.add({n: a[2:] for n, a in actual.items()}, {n: e[2:] for n, e in expected.items()})
    found = {(result.output, result.group): result.token_errors for result in measurement.results(())}
    assert found["embedding", None] is None
    whole, cls, patches = (found["tokens", group] for group in (None, "cls", "patches"))
    assert whole is not None
    assert cls is not None
    assert patches is not None
    assert (whole.tokens, whole.worst_image, whole.worst_token, whole.quantiles[-1]) == (18, 2, 4, 0.5)
    assert (cls.tokens, cls.worst_image, cls.worst_token, cls.quantiles[-1]) == (3, 1, 0, 0.25)
    assert (patches.tokens, patches.worst_image, patches.worst_token) == (15, 2, 3)
