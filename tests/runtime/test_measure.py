from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from npu_runtime.artifact.schema import TensorSpec
from npu_runtime.backends.base import StageTimes
from npu_runtime.bench.measure import INPUTS, measure_latency, measure_stages

Array = npt.NDArray[np.float32]


class Recorder:
    """In place of an encoder: writes its calls into a list that several share."""

    def __init__(self, name: str, calls: list[tuple[str, Array]], delay_s: float = 0) -> None:
        self.manifest = type("", (), {"inputs": (TensorSpec("pixel_values", "float32", ("B", 3, 2, 2)),)})
        self._name, self._calls, self._delay_s = name, calls, delay_s

    def __call__(self, pixel_values: Array) -> Array:
        self._calls.append((self._name, pixel_values))
        time.sleep(self._delay_s)
        return pixel_values


def measure(
    names: str, batches: list[int], **options: Any
) -> tuple[dict[tuple[str, int], list[float]], list[tuple[str, Array]]]:
    calls: list[tuple[str, Array]] = []
    encoders: Any = {name: Recorder(name, calls) for name in names}
    return measure_latency(encoders, batches, settle_s=0, **options), calls


def test_every_round_runs_each_encoder_once() -> None:
    _, calls = measure("abc", [1, 4], iterations=5, warmup=2)
    assert len(calls) == 3 * 2 * 7
    for start in range(0, len(calls), 3):
        round_calls = calls[start : start + 3]
        assert sorted(name for name, _ in round_calls) == ["a", "b", "c"]
        assert len({id(pixel_values.base) for _, pixel_values in round_calls}) == 1
        assert all(np.array_equal(pixel_values, round_calls[0][1]) for _, pixel_values in round_calls)
    assert {len(pixel_values) for _, pixel_values in calls[:21]} == {1}
    assert {len(pixel_values) for _, pixel_values in calls[21:]} == {4}


def test_every_order_of_the_encoders_occurs() -> None:
    _, calls = measure("abc", [1], iterations=60, warmup=0)
    played = "".join(name for name, _ in calls)
    orders = {played[start : start + 3] for start in range(0, len(played), 3)}
    assert orders == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_inputs_rotate_and_are_seeded_standard_normal_of_the_manifests_shape() -> None:
    _, calls = measure("a", [2], iterations=2 * INPUTS, warmup=0, seed=3)
    expected = np.random.default_rng(3).standard_normal((INPUTS, 2, 3, 2, 2), np.float32)
    for index, (_, pixel_values) in enumerate(calls):
        np.testing.assert_array_equal(pixel_values, expected[index % INPUTS])
    assert pixel_values.dtype == np.float32
    assert len({pixel_values.tobytes() for _, pixel_values in calls}) == INPUTS


def test_warm_up_rounds_are_run_and_not_kept() -> None:
    samples, calls = measure("ab", [1, 2], iterations=3, warmup=4)
    assert {key: len(values) for key, values in samples.items()} == {
        (name, batch): 3 for name in "ab" for batch in (1, 2)
    }
    assert len(calls) == 2 * 2 * 7


def test_progress_counts_the_images_of_every_call() -> None:
    images: list[int] = []
    measure("ab", [1, 4], iterations=3, warmup=2, advance=images.append)
    assert images == [1] * 2 * (3 + 2) + [4] * 2 * (3 + 2)


def test_a_batch_size_ends_where_its_own_rounds_are_enough() -> None:
    seen: list[list[int]] = []
    images: list[int] = []

    def enough(samples: Mapping[str, Sequence[float]]) -> bool:
        seen.append([len(values) for values in samples.values()])
        return len(samples["a"]) == 3

    samples, calls = measure("ab", [1, 2], iterations=10, warmup=2, enough=enough, advance=images.append)
    assert {key: len(values) for key, values in samples.items()} == {
        (name, batch): 3 for name in "ab" for batch in (1, 2)
    }
    assert seen == [[1, 1], [2, 2], [3, 3]] * 2
    assert len(calls) == 2 * 2 * 5
    assert sum(images) == (1 + 2) * 2 * (10 + 2)


def test_an_interruption_leaves_whole_rounds() -> None:
    class Interrupted(Recorder):
        def __call__(self, pixel_values: Array) -> Array:
            if len(self._calls) == 3 * 5 + 2:
                raise KeyboardInterrupt
            return super().__call__(pixel_values)

    calls: list[tuple[str, Array]] = []
    encoders: Any = {name: Interrupted(name, calls) for name in "abc"}
    samples: dict[tuple[str, int], list[float]] = {}
    with pytest.raises(KeyboardInterrupt):
        measure_latency(encoders, [1, 4], iterations=9, warmup=2, settle_s=0, samples=samples)
    assert {key: len(values) for key, values in samples.items()} == {(name, 1): 3 for name in "abc"}


class Staged(Recorder):
    """Its stages are the number of the call."""

    def time_stages(self, pixel_values: Array) -> StageTimes | None:
        self(pixel_values)
        return None if self._name == "c" else StageTimes(1, len(self._calls), 0.5)


def test_stages_are_timed_in_rounds_of_every_encoder_and_kept_of_those_that_can_tell() -> None:
    calls: list[tuple[str, Array]] = []
    encoders: Any = {name: Staged(name, calls) for name in "abc"}
    stages = measure_stages(encoders, [1, 4], rounds=5)
    assert {key: len(times) for key, times in stages.items()} == {(name, b): 5 for name in "ab" for b in (1, 4)}
    for start in range(0, 30, 3):
        assert sorted(name for name, _ in calls[start : start + 3]) == ["a", "b", "c"]
    assert sorted(int(times.compute_ms) for of_one in stages.values() for times in of_one) == [
        index + 1 for index, (name, _) in enumerate(calls) if name != "c"
    ]
    assert len({pixel_values.tobytes() for _, pixel_values in calls[:15]}) == INPUTS


def test_a_latency_is_the_calls_own_in_milliseconds() -> None:
    encoders: Any = {"slow": Recorder("slow", [], delay_s=0.02), "quick": Recorder("quick", [])}
    samples = measure_latency(encoders, [1], iterations=3, warmup=0, settle_s=0.03)
    assert min(samples["slow", 1]) >= 20
    assert min(samples["quick", 1]) < 10
