from __future__ import annotations

import numpy as np
import pytest

from npu_runtime import ProgramError
from npu_runtime.artifact.schema import TensorSpec, TokenGroup, Tolerance
from npu_runtime.parity.measure import Measurement

GROUPS = (TokenGroup("cls", 0, 1), TokenGroup("registers", 1, 3), TokenGroup("patches", 3, 7))
SPECS = (TensorSpec("embedding", "float32", ("B", 8)), TensorSpec("tokens", "float32", ("B", 7, 8), GROUPS))
LIMITS = (Tolerance("embedding", "max_abs_error", 1.0, ""), Tolerance("tokens", "max_abs_error", 0.5, ""))


def outputs(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {spec.name: generator.standard_normal(spec.of_batch(count), np.float32) for spec in SPECS}


def test_kinds_of_tokens_are_measured_apart_and_the_whole_alone_is_judged() -> None:
    expected = outputs(2)
    actual = {name: array.copy() for name, array in expected.items()}
    actual["tokens"][1, 2] += 0.75  # a register
    measurement = Measurement(SPECS)
    measurement.add(actual, expected)
    results = {(r.output, r.group): r for r in measurement.results(LIMITS)}
    errors = {key: result.metrics.max_abs_error for key, result in results.items()}
    assert errors == {
        ("embedding", None): 0,
        ("tokens", None): pytest.approx(0.75),
        ("tokens", "cls"): 0,
        ("tokens", "registers"): pytest.approx(0.75),
        ("tokens", "patches"): 0,
    }
    assert [key for key, result in results.items() if result.checks] == [("embedding", None), ("tokens", None)]
    assert (results["embedding", None].passed, results["tokens", None].passed) == (True, False)


def test_chunks_add_up_and_the_worst_image_is_kept() -> None:
    expected = outputs(5)
    actual = {name: array + np.float32(1e-3) for name, array in expected.items()}
    actual["embedding"][3] += 1
    whole, parts = Measurement(SPECS), Measurement(SPECS)
    whole.add(actual, expected)
    for start, stop in ((0, 2), (2, 5)):
        parts.add(*({name: array[start:stop] for name, array in side.items()} for side in (actual, expected)))
    assert parts.results(LIMITS) == whole.results(LIMITS)
    assert parts.worst == whole.worst == 3
    assert np.array_equal(parts.worst_outputs[0]["embedding"], actual["embedding"][3:4])
    assert whole.results(LIMITS)[0].neighbours_kept is not None


def test_nan_is_worse_than_any_error() -> None:
    expected = outputs(3)
    actual = {name: array.copy() for name, array in expected.items()}
    actual["embedding"][0] *= 100
    actual["tokens"][2, 0, 0] = np.nan
    measurement = Measurement(SPECS)
    measurement.add(actual, expected)
    assert measurement.worst == 2


@pytest.mark.parametrize(
    "actual",
    [
        {"embedding": np.zeros((2, 8), np.float32)},
        {**outputs(2), "more": np.zeros((2, 8), np.float32)},
        outputs(3),
        {**outputs(2), "tokens": np.zeros((2, 6, 8), np.float32)},
    ],
    ids=["fewer", "more", "images", "shape"],
)
def test_outputs_of_another_shape_or_count_are_refused(actual: dict[str, np.ndarray]) -> None:
    with pytest.raises(ProgramError, match="other outputs than the baseline") as caught:
        Measurement(SPECS).add(actual, outputs(2))
    assert "embedding [2, 8]" in str(caught.value.expected)
