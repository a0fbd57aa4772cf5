from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from npu_runtime.artifact.schema import TensorSpec
from npu_runtime.bench import throughput
from npu_runtime.bench.measure import INPUTS
from npu_runtime.bench.throughput import SLICES, Load, Slice, measure_throughput, run_slice

Array = npt.NDArray[np.float32]
MS = 1_000_000
INPUT = np.zeros((INPUTS, 1), np.float32)


@pytest.fixture(autouse=True)
def _short_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "WARMUP_S", 0.01)


def play(window: Slice, calls: list[tuple[int, int, int]]) -> list[bool]:
    """Calls as (caller, start, end) in milliseconds, in the order of their ends."""
    return [window.take(caller, began * MS, ended * MS) for caller, began, ended in calls]


def test_calls_that_end_in_the_window_count_whole_and_those_in_flight_at_its_end_do_not() -> None:
    window = Slice(callers=2, seconds=0.1)
    warm = [(0, 0, 10), (1, 0, 40), (0, 10, 45)]  # the last of them opens the window, at 45
    straddling = [(1, 40, 80), (0, 45, 110), (1, 80, 150)]  # began before it; inside; ends at or after 145, closes it
    beyond = [(0, 110, 160)]
    assert play(window, warm + straddling) == [True] * 5 + [False]
    assert play(window, beyond) == [False]
    assert window.load() == Load(0.105, (40.0, 65.0, 70.0))


def test_nothing_is_measured_until_every_caller_has_ended_a_call_and_the_warm_up_has_passed() -> None:
    window = Slice(callers=2, seconds=0.001)
    before = [(0, 0, 2), (0, 2, 4), (1, 0, 5), (0, 4, 6), (1, 5, 11)]  # 10 ms have passed with the last, which opens
    assert play(window, [*before, (0, 6, 12), (1, 11, 18)]) == [True] * 6 + [False]
    assert window.load() == Load(0.007, (6.0, 7.0))
    window = Slice(callers=2, seconds=0.001)
    assert play(window, [(0, 0, 20), (0, 20, 40), (1, 0, 45), (0, 40, 60), (1, 45, 110)]) == [True] * 4 + [False]
    assert window.load() == Load(0.05, (65.0,))
    with pytest.raises(ValueError, match="not closed"):
        Slice(callers=1, seconds=1).load()


def test_a_window_lasts_at_least_as_long_as_the_longest_call_of_the_warm_up() -> None:
    window = Slice(callers=1, seconds=0.001)
    calls = [(0, 0, 50), (0, 50, 60), (0, 60, 80), (0, 80, 100), (0, 100, 115)]
    assert play(window, calls) == [True] * 4 + [False]
    assert window.load() == Load(0.055, (20.0, 20.0, 15.0))


@pytest.mark.parametrize("callers", [1, 2, 3, 7])
@pytest.mark.parametrize("together", [True, False])
def test_the_rate_of_calls_of_one_length_is_exact(callers: int, together: bool) -> None:
    window = Slice(callers, seconds=1)
    ends = sorted((200 * k + (0 if together else 20 * c), c) for k in range(1, 20) for c in range(callers))
    play(window, [(caller, end - 200, end) for end, caller in ends])
    load = window.load()
    assert set(load.latencies_ms) == {200.0}
    if together or callers == 1:
        assert len(load.latencies_ms) / load.seconds == pytest.approx(callers / 0.2)
    else:  # a part of a round is left or won at the end
        assert len(load.latencies_ms) / load.seconds == pytest.approx(callers / 0.2, rel=0.2)


def test_the_rate_of_calls_of_random_lengths_is_right_on_average() -> None:
    generator = np.random.default_rng(0)
    calls = seconds = 0.0
    for _ in range(400):
        window = Slice(callers=3, seconds=0.2)
        began, ended = np.zeros(3), generator.exponential(50, 3)
        more = True
        while more:
            caller = int(ended.argmin())
            more = window.take(caller, int(began[caller] * MS), int(ended[caller] * MS))
            began[caller] = ended[caller]
            ended[caller] += generator.exponential(50)
        load = window.load()
        calls, seconds = calls + len(load.latencies_ms), seconds + load.seconds
    assert calls / seconds == pytest.approx(3 / 0.05, rel=0.03)


@pytest.mark.parametrize("callers", [1, 4])
def test_callers_that_do_not_hinder_each_other_add_their_rates(callers: int) -> None:
    load = run_slice(lambda _: time.sleep(0.02), INPUT, callers, 0.4)
    assert min(load.latencies_ms) >= 20
    assert load.seconds >= 0.4
    assert 0.4 * callers / 0.02 < len(load.latencies_ms) / load.seconds < 1.1 * callers / 0.02


def test_behind_a_lock_more_callers_wait_longer_and_gain_nothing() -> None:
    lock = threading.Lock()

    def call(_: Array) -> None:
        with lock:
            time.sleep(0.01)

    load = run_slice(call, INPUT, 4, 0.4)
    assert len(load.latencies_ms) / load.seconds <= 1 / 0.01
    assert max(load.latencies_ms) >= 20


def test_no_more_calls_are_in_flight_than_there_are_callers() -> None:
    flying = most = 0
    lock = threading.Lock()

    def call(_: Array) -> None:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.002)
        with lock:
            flying -= 1

    run_slice(call, INPUT, 3, 0.1)
    assert (most, flying) == (3, 0)


def test_an_error_of_one_call_ends_the_load_with_it_and_the_other_callers_stop() -> None:
    counts = [0]

    def call(_: Array) -> None:
        counts[0] += 1
        if counts[0] == 20:
            raise ArithmeticError("the twentieth")
        time.sleep(0.001)

    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="the twentieth"):
        run_slice(call, INPUT, 3, 600)
    assert counts[0] < 30
    assert threading.active_count() == before


class Fake:
    """In place of an encoder."""

    def __init__(self, call: Callable[[Array], object]) -> None:
        self.manifest = type("", (), {"inputs": (TensorSpec("pixel_values", "float32", ("B", 3, 2, 2)),)})
        self._call = call

    def __call__(self, pixel_values: Array) -> object:
        return self._call(pixel_values)


def measure(calls: dict[str, Callable[[Array], object]], **options: Any) -> dict[tuple[str, int, int], Load]:
    loads: dict[tuple[str, int, int], Load] = {}
    encoders: Any = {name: Fake(call) for name, call in calls.items()}
    measure_throughput(encoders, options.pop("batches", [1]), options.pop("callers", [1]), loads, **options)
    return loads


def test_every_backend_batch_and_number_of_callers_is_loaded_for_the_time_that_was_asked_for() -> None:
    done: list[int] = []
    calls = {name: lambda _: time.sleep(0.002) for name in "ab"}
    loads = measure(calls, batches=[1, 2], callers=[1, 3], seconds=0.1, advance=done.append)
    assert loads.keys() == {(name, batch, callers) for name in "ab" for batch in (1, 2) for callers in (1, 3)}
    assert all(load.seconds >= 0.1 for load in loads.values())
    assert sum(done) == len(loads) * SLICES


def test_backends_take_turns_in_slices_in_an_order_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[str] = []

    def run(encoder: Fake, _: object, __: int, seconds: float) -> Load:
        encoder(INPUT)
        return Load(seconds, (1.0,))

    monkeypatch.setattr(throughput, "run_slice", run)
    measure({"a": lambda _: played.append("a"), "b": lambda _: played.append("b")}, callers=[1, 2], seconds=4.0)
    turns = ["".join(played[start : start + 2]) for start in range(0, len(played), 2)]
    assert len(turns) == 2 * SLICES
    assert set(turns) == {"ab", "ba"}


def test_slow_calls_are_measured_in_fewer_slices_and_at_least_once() -> None:
    loads = measure({"slow": lambda _: time.sleep(0.1)}, seconds=0.04)
    assert loads["slow", 1, 1].seconds >= 0.1
    assert len(loads["slow", 1, 1].latencies_ms) >= 1


def test_inputs_are_random_and_rotate_and_callers_begin_at_different_ones() -> None:
    seen: dict[int, list[bytes]] = {}

    def call(pixel_values: Array) -> None:
        seen.setdefault(threading.get_ident(), []).append(pixel_values.tobytes())
        time.sleep(0.001)

    measure({"a": call}, batches=[2], callers=[2], seconds=0.02, seed=3)
    expected = np.random.default_rng(3).standard_normal((INPUTS, 2, 3, 2, 2), np.float32)
    place = {array.tobytes(): index for index, array in enumerate(expected)}
    slices = [[place[given] for given in of_caller] for of_caller in seen.values()]
    assert {places[0] for places in slices} == {0, 1}
    for places in slices:
        assert all(after == (before + 1) % INPUTS or after < 2 for before, after in itertools.pairwise(places))


def test_an_interruption_leaves_whole_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = itertools.count(1)

    def run(_: object, __: object, callers: int, seconds: float) -> Load:
        if (number := next(slices)) == 7:
            raise KeyboardInterrupt
        return Load(seconds, (number,) * callers)

    monkeypatch.setattr(throughput, "run_slice", run)
    loads: dict[tuple[str, int, int], Load] = {}
    encoders: Any = {name: Fake(lambda _: None) for name in "ab"}
    with pytest.raises(KeyboardInterrupt):
        measure_throughput(encoders, [1], [2], loads, seconds=4.0)
    assert loads["a", 1, 2].seconds == loads["b", 1, 2].seconds == 3.0
    assert sorted((*loads["a", 1, 2].latencies_ms, *loads["b", 1, 2].latencies_ms)) == [
        number for number in range(1, 7) for _ in range(2)
    ]
