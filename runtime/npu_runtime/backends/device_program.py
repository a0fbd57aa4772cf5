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
from npu_runtime.devices.accelerator import Accelerator
from npu_runtime.devices.operators import Operators, watch_operators
from npu_runtime.errors import UnavailableError, first_line

if TYPE_CHECKING:
    from npu_runtime.backends.torch_session import Call

WARMUPS = 3
"""Runs on a side stream before a capture, as PyTorch's note on CUDA graphs asks; TorchScript optimises in them."""
TRIALS = 9
"""Runs of each, in turn, by which replay and plain calls are compared."""


class DeviceProgram:
    """Fixed buffers on host and device, and the program between them. One thread at a time may use it.

    A graph reads and writes the same memory each time, so inputs are copied in and results out, and the
    caller owns what it gets.
    """

    def __init__(self, accelerator: Accelerator, call: Call, spec: TensorSpec, batch: int) -> None:
        self.accelerator = accelerator
        self._call: Call | None = call
        self._input = accelerator.drawn_images(spec, batch, seed=0)
        self._host_input = accelerator.pinned(tuple(self._input.shape), self._input.dtype)
        self._spec = spec
        self._host_outputs: dict[int, torch.Tensor] = {}
        self._graph: Any = None
        self._captured: Sequence[torch.Tensor] = ()

    def first_run(self) -> tuple[Operators, Sequence[torch.Tensor]]:
        """What one run calls, and its outputs; raises ProgramError when it mixes devices."""
        return watch_operators(self.accelerator.device, self._plain)

    def capture(self, *, required: bool) -> GraphReport:
        """Record the program once for replay, and compare a replay with a plain call on the same input.

        Unless it is `required`, a capture that fails, or a replay that is slower, leaves plain calls and says so.
        Raises UnavailableError when it is required and fails.
        """
        batch = len(self._input)
        try:
            with torch.inference_mode():
                with self.accelerator.on_capture_stream():
                    for _ in range(WARMUPS):
                        self._plain()
                graph = self.accelerator.new_graph()
                with self.accelerator.capture(graph):
                    captured = self._plain()
        except (RuntimeError, AttributeError) as error:  # AttributeError: this torch_npu has no graphs
            reason = f"capture failed: {first_line(error)}"
            if not required:
                return GraphReport(batch, False, reason, None, None)
            raise UnavailableError(
                f"the program cannot be captured as a graph on {self.accelerator.device}",
                where=f"batch {batch}",
                got=reason,
                hint='graph="auto" goes on without; TASK_QUEUE_ENABLE=2 forbids capture on an NPU',
            ) from error
        self._graph, self._captured = graph, captured
        difference = self._difference()
        speedup = self._speedup()
        if speedup < 1 and not required:
            self._drop_graph()
            return GraphReport(batch, False, "replay is slower than plain calls here", difference, speedup)
        return GraphReport(batch, True, None, difference, speedup)

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

    def _difference(self) -> float:
        """Largest absolute difference of a replay from a plain call on new input; 0 when equal bit for bit."""
        with torch.inference_mode():
            self._input.copy_(self.accelerator.drawn_images(self._spec, len(self._input), seed=1))
            plain = [tensor.cpu() for tensor in self._plain()]
            replayed = [tensor.cpu() for tensor in self._compute()]
        return max(
            0.0 if torch.equal(a, b) else float((a.double() - b.double()).abs().max()) for a, b in zip(plain, replayed)
        )

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

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._captured = ()
            self._graph.reset()
            self._graph = None
