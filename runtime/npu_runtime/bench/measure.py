"""Time encoders side by side: every round runs each of them once, so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import numpy as np

from npu_runtime.artifact.random_images import draw_images
from npu_runtime.artifact.store import Images
from npu_runtime.backends.base import StageTimes
from npu_runtime.encoder import Encoder
from npu_runtime.steps import Advance, unwatched

INPUTS = 4
"""Different inputs that a benchmark rotates through."""
STAGE_ROUNDS = 20
"""Rounds at most in which the stages of a call are timed."""


def measure_latency(
    encoders: Mapping[str, Encoder],
    batches: Sequence[int],
    *,
    iterations: int,
    warmup: int,
    seed: int = 0,
    settle_s: float = 0.01,
    advance: Advance = unwatched,
    enough: Callable[[Mapping[str, Sequence[float]]], bool] = lambda _: False,
    samples: MutableMapping[tuple[str, int], list[float]] | None = None,
) -> MutableMapping[tuple[str, int], list[float]]:
    """Latencies in milliseconds of `encoder(pixel_values)`, by name and batch size, one for each round.

    A call is timed from numpy to numpy on a monotonic clock, input checks and copies included. Inputs
    are random and rotate; the order of the encoders is drawn anew each round, so that none
    always follows the same other. `settle_s` seconds pass before each call, since threads of the one
    before spin for work a while. The warm-up rounds are not kept. `enough` is asked after each round that
    is kept, with the batch size's samples so far by name, and ends it where it says so. `advance`
    is told how many images each call took, and of those that were not needed. `samples`, where it is given, is
    filled and returned: it holds whole rounds also when this is interrupted.
    """
    generator = np.random.default_rng(seed)
    samples = {} if samples is None else samples
    names = list(encoders)
    inputs = {batch: draw_inputs(encoders, batch, generator) for batch in batches}
    for batch in batches:
        so_far = {name: samples.setdefault((name, batch), []) for name in names}
        try:
            for index in range(warmup + iterations):
                for name in (names[place] for place in generator.permutation(len(names))):
                    pixel_values = inputs[batch][index % INPUTS]
                    time.sleep(settle_s)
                    start = time.perf_counter_ns()
                    encoders[name](pixel_values)
                    elapsed = time.perf_counter_ns() - start
                    if index >= warmup:
                        so_far[name].append(elapsed / 1e6)
                    advance(batch)
                if index >= warmup and enough(so_far):
                    advance(batch * len(names) * (warmup + iterations - index - 1))
                    break
        finally:
            whole = min(map(len, so_far.values()))
            for values in so_far.values():
                del values[whole:]
    return samples


def measure_stages(
    encoders: Mapping[str, Encoder], batches: Sequence[int], *, rounds: int, seed: int = 0
) -> dict[tuple[str, int], list[StageTimes]]:
    """Transfer in, compute and transfer out of calls, by name and batch size, one for each round.

    Rounds, inputs and the order of the encoders are as those of `measure_latency`, after which this is run, so
    that nothing is cold. Encoders that cannot tell the stages apart have no entry.
    """
    generator = np.random.default_rng(seed)
    stages: dict[tuple[str, int], list[StageTimes]] = {}
    names = list(encoders)
    for batch in batches:
        inputs = draw_inputs(encoders, batch, generator)
        for index in range(rounds):
            for name in (names[place] for place in generator.permutation(len(names))):
                times = encoders[name].time_stages(inputs[index % INPUTS])
                if times is not None:
                    stages.setdefault((name, batch), []).append(times)
    return stages


def draw_inputs(encoders: Mapping[str, Encoder], batch: int, generator: np.random.Generator) -> Images:
    """INPUTS batches of random `pixel_values` for encoders of one artifact."""
    spec = next(iter(encoders.values())).manifest.inputs[0]
    return draw_images(generator, (INPUTS, *spec.of_batch(batch)), spec.dtype)
