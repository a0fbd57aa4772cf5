"""What `torch.npu` offers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

import torch

from torch_npu.npu import utils
from torch_npu.npu.graphs import NPUGraph, graph, graph_pool_handle, is_current_stream_capturing
from torch_npu.npu.settings import config, conv, matmul, set_compile_mode
from torch_npu.npu.streams import Event, Stream, current_stream, default_stream, set_stream, stream
from torch_npu.version import __version__

_simulated = torch.ops.simulated_npu
_Device: TypeAlias = torch.device | str | int | None

if tuple(map(int, __version__.split(".")[:2])) >= (2, 13):
    _simulated.let_fallback_be_disabled()

if os.environ.get("SIMULATED_NPU_COMPATIBLE_IMPL") != "0":
    from torch_npu.npu.settings import are_compatible_impl_enabled, use_compatible_impl  # noqa: F401


def _lazy_init() -> None:
    """Raises in a child forked after the first use of a device."""
    _simulated.initialise()


def _is_in_bad_fork() -> bool:
    return _simulated.is_forked_too_late()


def _index(of: _Device) -> int:
    index = of if of is None or isinstance(of, int) else torch.device(of).index
    return _simulated.current_device() if index is None else index


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return _simulated.is_initialised()


def device_count() -> int:
    return _simulated.device_count()


def current_device() -> int:
    _lazy_init()
    return _simulated.current_device()


def set_device(device: _Device) -> None:
    _lazy_init()
    _simulated.set_device(_index(device))


class DeviceContext:
    """Makes a device the current one meanwhile."""

    def __init__(self, device: _Device) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._before = current_device()
        set_device(self._index)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        set_device(self._before)


device = DeviceContext


def synchronize(device: _Device = None) -> None:
    _simulated.synchronize(_index(device))


def _of_memory(name: str) -> Callable[[_Device], int]:
    def read(device: _Device = None) -> int:
        return getattr(_simulated, name)(_index(device))

    return read


memory_allocated = _of_memory("memory_allocated")
max_memory_allocated = _of_memory("max_memory_allocated")
memory_reserved = _of_memory("memory_reserved")


def reset_peak_memory_stats(device: _Device = None) -> None:
    _simulated.reset_peak_memory_stats(_index(device))


def mem_get_info(device: _Device = None) -> tuple[int, int]:
    """Bytes that are free and bytes in all."""
    _lazy_init()
    total = _simulated.total_memory()
    return total - memory_reserved(device), total


def empty_cache() -> None:
    _simulated.empty_cache()


@dataclass(frozen=True)
class DeviceProperties:
    name: str
    total_memory: int


def get_device_properties(device: _Device = None) -> DeviceProperties:
    _lazy_init()
    index = _index(device)
    if not 0 <= index < device_count():
        raise AssertionError("Invalid device id")
    return DeviceProperties("Ascend910B4", _simulated.total_memory())


def get_device_name(device: _Device = None) -> str:
    return get_device_properties(device).name


def manual_seed(seed: int) -> None:
    _simulated.manual_seed(_simulated.current_device(), seed)


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _simulated.manual_seed(index, seed)


def get_rng_state(device: _Device = "npu") -> torch.Tensor:
    _lazy_init()
    return _simulated.rng_state(_index(device))


def set_rng_state(new_state: torch.Tensor, device: _Device = "npu") -> None:
    _lazy_init()
    _simulated.set_rng_state(_index(device), new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(new_states: Sequence[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


__all__ = [
    "Event",
    "NPUGraph",
    "Stream",
    "config",
    "conv",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "graph",
    "graph_pool_handle",
    "is_available",
    "is_current_stream_capturing",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "matmul",
    "max_memory_allocated",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "reset_peak_memory_stats",
    "set_compile_mode",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
    "utils",
]
