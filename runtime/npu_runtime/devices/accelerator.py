"""One accelerator, driven through torch's module for its kind."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from npu_runtime.artifact.random_images import draw_images
from npu_runtime.artifact.schema import TensorSpec
from npu_runtime.devices.device import Device
from npu_runtime.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device's memory."""

    allocated_nbytes: int
    """Held by this process's tensors."""
    peak_nbytes: int
    """The most that they held since `reset_peak`."""
    free_nbytes: int
    """Of the whole card, other processes' use taken off."""
    total_nbytes: int


class Accelerator:
    """A cuda or npu device: placement, waiting, events, memory, seeds and graphs.

    Made after `require_device`. torch.npu mirrors torch.cuda, so one class drives both; what differs is in
    the table of kinds.
    """

    def __init__(self, device: Device) -> None:
        import torch

        self.device = device
        self.torch_device = torch.device(str(device))
        self._module: Any = getattr(torch, device.kind)
        self._process = os.getpid()

    def check_process(self) -> None:
        """Refuse a process forked after the device was started, in which no call to it would work."""
        if os.getpid() != self._process:
            raise UsageError(
                f"the process was forked after {self.device} was started",
                expected="a process that loads the encoder itself",
                hint="use multiprocessing.get_context('spawn'), or load the encoder in the child",
            )

    def current(self) -> AbstractContextManager[object]:
        """A context in which this is torch's current device of its kind."""
        context: AbstractContextManager[object] = self._module.device(self.device.index)
        return context

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
        self._module.synchronize(self.device.index)

    def event(self) -> Any:
        """An event that keeps its time: `record`, `synchronize`, and `elapsed_time(later)` in milliseconds."""
        return self._module.Event(enable_timing=True)

    def drawn_images(self, spec: TensorSpec, batch: int, seed: int) -> torch.Tensor:
        """Random images on the device, of the same numbers on every one; no generator's state moves."""
        import torch

        images = draw_images(np.random.default_rng(seed), spec.of_batch(batch), spec.dtype)
        return torch.from_numpy(images).to(self.torch_device)

    def memory(self) -> Memory:
        index = self.device.index
        free, total = self._module.mem_get_info(index)
        return Memory(self._module.memory_allocated(index), self._module.max_memory_allocated(index), free, total)

    def reset_peak(self) -> None:
        self._module.reset_peak_memory_stats(self.device.index)

    def release(self) -> None:
        """Give memory that no tensor holds back to the card, for other processes."""
        with self.current():
            self._module.empty_cache()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies from and to without a detour, where it can be had."""
        import torch

        plain = torch.empty(shape, dtype=dtype, device="cpu")
        try:
            pinned = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
        except (RuntimeError, NotImplementedError):
            return plain
        # Where none is left, torch_npu 2.13 gives a tensor without memory (CachingHostAllocator.cpp, alloc).
        return pinned if pinned.data_ptr() or not pinned.numel() else plain

    @functools.cached_property
    def graph_memory(self) -> tuple[Any, Any]:
        """A pool that the graphs share, which never run at the same time, and the stream on which they are captured."""
        return self._module.graph_pool_handle(), self._module.Stream(device=self.device.index)

    def forget_graph_memory(self) -> None:
        """Give the next graph a pool and a stream of its own.

        A capture that fails to begin leaves torch_npu's allocator recording for the pool, which it refuses to do
        twice (torch_npu/csrc/core/npu/NPUGraph.cpp, capture_begin).
        """
        self.__dict__.pop("graph_memory", None)

    def new_graph(self) -> Any:
        """An empty graph of this kind of device."""
        return getattr(self._module, str(self.device.traits.graph_class))()

    @contextlib.contextmanager
    def on_capture_stream(self) -> Iterator[None]:
        """Work is queued there, between what the current stream was given before and what it is given after."""
        _, stream = self.graph_memory
        current = self._module.current_stream(self.device.index)
        stream.wait_stream(current)
        with self._module.stream(stream):
            yield
        current.wait_stream(stream)

    @contextlib.contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        """Work is recorded in the graph and not run. Other threads may go on using the device."""
        pool, stream = self.graph_memory
        current = self._module.current_stream(self.device.index)
        # torch's own context does not put the stream back when the end of a failed capture raises.
        with (
            self._module.stream(current),
            self._module.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            yield
