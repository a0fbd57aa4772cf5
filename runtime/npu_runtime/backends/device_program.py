"""A program for one batch size on an accelerator: checked on its first run, then replayed as a graph or called."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from npu_runtime.artifact.schema import TensorSpec
from npu_runtime.artifact.store import Images
from npu_runtime.backends.base import Array, GraphReport, StageTimes
from npu_runtime.backends.replay import Limits, Verdict, judge_replays
from npu_runtime.devices.accelerator import Accelerator
from npu_runtime.devices.failures import is_out_of_memory, require_computing
from npu_runtime.devices.operators import Operators, watch_operators
from npu_runtime.errors import UnavailableError, first_line

if TYPE_CHECKING:
    from npu_runtime.backends.torch_session import Call

WARMUPS = 3
"""Runs on a side stream before a capture, as PyTorch's note on CUDA graphs asks; TorchScript optimises in them."""
TRIALS = 9
"""Runs of each, in turn, by which the times of replay and plain calls are compared."""
JUDGED_SEEDS = (1, 2)
"""Of the inputs, one after the other, on which replays are judged; the capture saw that of seed 0."""


class DeviceProgram:
    """Fixed buffers on host and device, and the program between them. One thread at a time may use it.

    A graph reads and writes the same memory each time, so inputs are copied in and results out, and the
    caller owns what it gets.
    """

    def __init__(
        self, accelerator: Accelerator, call: Call, spec: TensorSpec, batch: int, limits: Sequence[Limits]
    ) -> None:
        self.accelerator = accelerator
        self._call: Call | None = call
        self._input = accelerator.drawn_images(spec, batch, seed=0)
        self._host_input = accelerator.pinned(tuple(self._input.shape), self._input.dtype)
        self._spec = spec
        self._limits = limits
        self._host_outputs: dict[int, torch.Tensor] = {}
        self._graph: Any = None
        self._captured: Sequence[torch.Tensor] = ()

    def first_run(self) -> tuple[Operators, Sequence[torch.Tensor]]:
        """What one run calls, and its outputs; raises ProgramError when it mixes devices."""
        return watch_operators(self.accelerator.device, self._plain)

    def capture(self, *, required: bool) -> GraphReport:
        """Record the program once for replay, and compare replays with plain calls on two inputs.

        A graph is used whose replays give what plain calls give, within the outputs' limits. Unless it is
        `required`, a capture that fails, replays that give other outputs or that are slower leave plain calls, and
        the report says so. Raises UnavailableError when it is required and fails, or gives other outputs.
        """
        batch = len(self._input)
        try:
            self._record()
            verdict = self._judge()
        except (RuntimeError, AttributeError) as error:  # AttributeError: this torch_npu has no graphs
            self._abandon_graph()
            require_computing(self.accelerator, error, where=f"the capture of batch {batch}")
            reason = f"capture failed: {first_line(error)}"
            if not required:
                return GraphReport(batch, False, reason, None, None)
            if is_out_of_memory(error):
                raise
            raise UnavailableError(
                f"the program cannot be captured as a graph on {self.accelerator.device}",
                where=f"batch {batch}",
                got=reason,
                hint='graph="auto" goes on without; TASK_QUEUE_ENABLE=2 forbids capture on an NPU',
            ) from error
        if verdict.breach is not None:
            self._abandon_graph()
            if not required:
                reason = f"replays give other outputs: {verdict.breach}"
                return GraphReport(batch, False, reason, verdict.max_abs_difference, None)
            raise UnavailableError(
                f"replays of the captured graph give other outputs than plain calls on {self.accelerator.device}",
                where=f"batch {batch}",
                expected="the outputs of plain calls, within the manifest's tolerances",
                got=verdict.breach,
                hint='graph="auto" or graph=False makes plain calls',
            )
        speedup = self._speedup()
        if speedup < 1 and not required:
            self._drop_graph()
            reason = "replay is slower than plain calls here"
            return GraphReport(batch, False, reason, verdict.max_abs_difference, speedup)
        return GraphReport(batch, True, None, verdict.max_abs_difference, speedup)

    def run(self, pixel_values: Images, wanted: Sequence[int]) -> list[Array]:
        """The outputs of these places, in arrays of their own."""
        with self.accelerator.current(), torch.inference_mode():
            self._copy_in(pixel_values)
            hosts = self._copy_out(self._compute(), wanted)
            self.accelerator.synchronize()
        return [host.numpy().copy() for host in hosts]

    def time_stages(self, pixel_values: Images, wanted: Sequence[int]) -> StageTimes:
        """Milliseconds of one run on the device's own clock.

        The transfer in holds the host's copy into pinned memory, for which the device waits; the arrays that
        `run` makes for the caller in the end are in none of the stages.
        """
        with self.accelerator.current(), torch.inference_mode():
            events = [self.accelerator.event() for _ in range(4)]
            events[0].record()
            self._copy_in(pixel_values)
            events[1].record()
            results = self._compute()
            events[2].record()
            self._copy_out(results, wanted)
            events[3].record()
            self.accelerator.synchronize()
        return StageTimes(*(a.elapsed_time(b) for a, b in itertools.pairwise(events)))

    def close(self) -> None:
        """Let go of the program and its buffers."""
        self._drop_graph()
        self._call = None
        self._host_outputs.clear()
        del self._input, self._host_input

    def _copy_in(self, pixel_values: Images) -> None:
        np.copyto(self._host_input.numpy(), pixel_values)
        self._input.copy_(self._host_input, non_blocking=True)

    def _compute(self) -> Sequence[torch.Tensor]:
        if self._graph is None:
            return self._plain()
        self._graph.replay()
        return self._captured

    def _plain(self) -> Sequence[torch.Tensor]:
        if self._call is None:
            raise ValueError("the program is closed")
        return self._call(self._input)

    def _copy_out(self, results: Sequence[torch.Tensor], wanted: Sequence[int]) -> list[torch.Tensor]:
        """Host buffers that hold the results once the device has been waited for."""
        for index in wanted:
            if index not in self._host_outputs:
                self._host_outputs[index] = self.accelerator.pinned(tuple(results[index].shape), results[index].dtype)
            self._host_outputs[index].copy_(results[index], non_blocking=True)
        return [self._host_outputs[index] for index in wanted]

    def _record(self) -> None:
        with torch.inference_mode():
            with self.accelerator.on_capture_stream():
                for _ in range(WARMUPS):
                    self._plain()
            graph = self.accelerator.new_graph()
            with self.accelerator.capture(graph):
                captured = self._plain()
        self._graph, self._captured = graph, captured

    def _judge(self) -> Verdict:
        """Plain calls and replays on each input, in turn, so that what a replay leaves from the one before shows."""
        plain, replayed = [], []
        with torch.inference_mode():
            for seed in JUDGED_SEEDS:
                self._input.copy_(self.accelerator.drawn_images(self._spec, len(self._input), seed))
                plain.append([tensor.cpu() for tensor in self._plain()])
                replayed.append([tensor.cpu() for tensor in self._compute()])
        return judge_replays(replayed, plain, self._limits)

    def _speedup(self) -> float:
        """Median over rounds of plain / replayed, host time until the device is done."""

        def seconds(call: Callable[[], object]) -> float:
            self.accelerator.synchronize()
            start = time.perf_counter()
            call()
            self.accelerator.synchronize()
            return time.perf_counter() - start

        with torch.inference_mode():
            return median(seconds(self._plain) / seconds(self._compute) for _ in range(TRIALS))

    def _abandon_graph(self) -> None:
        """Drop the graph with the pool and the stream of its capture, which may be in any state, and try the device.

        Raises what a plain call raises.
        """
        self._drop_graph()
        self.accelerator.forget_graph_memory()
        with torch.inference_mode():
            self._plain()
        self.accelerator.synchronize()

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._captured = ()
            self._graph.reset()
            self._graph = None
