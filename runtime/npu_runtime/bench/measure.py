"""Time encoders side by side: every round runs each of them once, so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from npu_runtime.encoder import Encoder

INPUTS = 4
"""Different inputs that a benchmark rotates through."""


def measure_latency(
    encoders: Mapping[str, Encoder],
    batches: Sequence[int],
    *,
    iterations: int,
    warmup: int,
    seed: int = 0,
    settle_s: float = 0.01,
    progress: Callable[[], None] = lambda: None,
    enough: Callable[[Mapping[str, Sequence[float]]], bool] = lambda _: False,
) -> dict[tuple[str, int], list[float]]:
    """Latencies in milliseconds of `encoder(pixel_values)`, by name and batch size, one for each round.

    A call is timed from numpy to numpy on a monotonic clock, input checks and copies included. Inputs
    are standard normal and rotate; the order of the encoders is drawn anew each round, so that none
    always follows the same other. `settle_s` seconds pass before each call, since threads of the one
    before spin for work a while. The warm-up rounds are not kept. `enough` is asked after each round that
    is kept, with the batch size's samples so far by name, and ends it where it says so. `progress` is called
    once for each round of a batch size, those that were not needed included.
    """
    generator = np.random.default_rng(seed)
    shape = next(iter(encoders.values())).manifest.inputs[0]
    inputs = {b: generator.standard_normal((INPUTS, *shape.of_batch(b)), np.float32) for b in batches}
    samples: dict[tuple[str, int], list[float]] = {(name, b): [] for b in batches for name in encoders}
    names = list(encoders)
    for batch in batches:
        so_far = {name: samples[name, batch] for name in encoders}
        for index in range(warmup + iterations):
            for name in (names[place] for place in generator.permutation(len(names))):
                pixel_values = inputs[batch][index % INPUTS]
                time.sleep(settle_s)
                start = time.perf_counter_ns()
                encoders[name](pixel_values)
                elapsed = time.perf_counter_ns() - start
                if index >= warmup:
                    samples[name, batch].append(elapsed / 1e6)
            progress()
            if index >= warmup and enough(so_far):
                for _ in range(index + 1, warmup + iterations):
                    progress()
                break
    return samples
