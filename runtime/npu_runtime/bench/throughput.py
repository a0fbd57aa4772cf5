"""Images a second and latencies under load: callers that share one encoder, each with one call in flight."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np

from npu_runtime.artifact.store import Images
from npu_runtime.bench.measure import INPUTS, draw_inputs
from npu_runtime.encoder import Encoder
from npu_runtime.steps import Advance, unwatched

SLICES = 4
"""Turns of each backend at most, so that drift hits all alike."""
WARMUP_S = 0.25
"""The least time under load before a slice is measured."""


@dataclass(frozen=True, slots=True)
class Load:
    """What was measured of one backend at one batch size and number of callers, in one slice or several."""

    seconds: float = 0.0
    latencies_ms: tuple[float, ...] = ()

    def __add__(self, other: Load) -> Load:
        return Load(self.seconds + other.seconds, self.latencies_ms + other.latencies_ms)


Loads = MutableMapping[tuple[str, int, int], Load]
"""By backend, batch size and callers."""


def measure_throughput(
    encoders: Mapping[str, Encoder],
    batches: Sequence[int],
    callers: Sequence[int],
    loads: Loads,
    *,
    seconds: float,
    seed: int = 0,
    advance: Advance = unwatched,
) -> None:
    """Put into `loads` what each encoder does under the load of so many threads, for `seconds` each.

    Every caller calls the shared encoder, waits for the result and calls again: as many calls are in flight as
    there are callers, and no queue can grow. A latency is from the call to its result, so where calls run one
    after the other (torch on an accelerator has a lock) it holds the wait for the others: more callers then show
    what queueing costs, and gain at most what the host does meanwhile. On the CPU each call takes the threads that
    the encoder was loaded with, so callers share the cores, or contend for them. Callers are threads of one Python.

    Encoders take turns in slices, in an order drawn anew; see `Slice` for which calls count. Inputs are standard
    normal and rotate, callers beginning at different ones. What is in `loads` when this is interrupted are whole
    slices; an error of any call ends the run with that error, once the calls in flight have ended. `advance` is told
    of SLICES for each backend, batch size and number of callers, slices that were not needed included.
    """
    generator = np.random.default_rng(seed)
    names = list(encoders)
    for batch in batches:
        inputs = draw_inputs(encoders, batch, generator)
        for count in callers:
            for _ in range(SLICES):
                for name in (names[place] for place in generator.permutation(len(names))):
                    before = loads.get((name, batch, count), Load())
                    if before.seconds < seconds:
                        # One assignment, so that an interruption leaves no half of it.
                        loads[name, batch, count] = before + run_slice(encoders[name], inputs, count, seconds / SLICES)
                    advance(1)


def run_slice(call: Callable[[Images], object], inputs: Images, callers: int, seconds: float) -> Load:
    """The load of `callers` threads on `call` for one slice of `seconds`; inputs are [INPUTS, B, ...]."""
    window = Slice(callers, seconds)

    def call_on(caller: int) -> None:
        for index in itertools.count(caller):
            began = time.perf_counter_ns()
            call(inputs[index % INPUTS])
            if not window.take(caller, began, time.perf_counter_ns()):
                return

    with ThreadPoolExecutor(callers) as pool:
        try:
            for done in as_completed([pool.submit(call_on, caller) for caller in range(callers)]):
                done.result()
        finally:
            window.stop()  # of an error or an interruption: the others make no further call
    return window.load()


class Slice:
    """Which calls of a slice count, decided call by call as they end. Threads share it.

    Warm-up: until every caller has ended a call and WARMUP_S have passed. The next call that ends opens the
    window, and the first that ends once it was open for as long as it should be closes it; callers go on until
    then. Calls that end after the opening one, the closing one included, are counted with their whole latency,
    even where they began before the window; calls still in flight when it closes are not. Both ends of the window
    are ends of calls, so that no part of a call is lost or won: on average calls / seconds is the rate at which
    they end. The window is at least as long as the longest call of the warm-up.
    """

    def __init__(self, callers: int, seconds: float) -> None:
        self._lock = threading.Lock()
        self._cold = set(range(callers))
        self._least_ns = seconds * 1e9
        self._first_ns: int | None = None
        self._opened_ns: int | None = None
        self._closed_ns: int | None = None
        self._stopped = False
        self._latencies_ms: list[float] = []

    def take(self, caller: int, began_ns: int, ended_ns: int) -> bool:
        """Take in a call that ended; whether the caller shall make another."""
        with self._lock:
            if self._stopped or self._closed_ns is not None:
                return False
            if self._opened_ns is None:
                self._warm_up(caller, began_ns, ended_ns)
                return True
            self._latencies_ms.append((ended_ns - began_ns) / 1e6)
            if ended_ns - self._opened_ns >= self._least_ns:
                self._closed_ns = ended_ns
            return self._closed_ns is None

    def stop(self) -> None:
        with self._lock:
            self._stopped = True

    def load(self) -> Load:
        """What was measured, once the window is closed."""
        if self._opened_ns is None or self._closed_ns is None:
            raise ValueError("the window is not closed")
        return Load((self._closed_ns - self._opened_ns) / 1e9, tuple(self._latencies_ms))

    def _warm_up(self, caller: int, began_ns: int, ended_ns: int) -> None:
        self._first_ns = began_ns if self._first_ns is None else min(self._first_ns, began_ns)
        if not self._cold and ended_ns - self._first_ns >= WARMUP_S * 1e9:
            self._opened_ns = ended_ns
        self._cold.discard(caller)
        self._least_ns = max(self._least_ns, ended_ns - began_ns)
