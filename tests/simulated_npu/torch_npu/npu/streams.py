"""Streams and events. Everything issued is done at once, so they order nothing; they are checked all the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_simulated = torch.ops.simulated_npu


def _device(of: torch.device | str | int | None) -> torch.device:
    device = torch.device("npu", of) if isinstance(of, int) else torch.device(of or "npu")
    return device if device.index is not None else torch.device("npu", _simulated.current_device())


class Event:
    """A point in time of a stream. torch's own event refuses subclasses, so this one holds it."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._event = torch.Event("npu", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)

    def record(self, stream: torch.Stream | None = None) -> None:
        self._event.record(stream)

    def wait(self, stream: torch.Stream | None = None) -> None:
        self._event.wait(stream)

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to a later one."""
        return self._event.elapsed_time(end_event._event)


class Stream(torch.Stream):
    def __new__(cls, device: torch.device | str | int | None = None, priority: int = 0, **which: int) -> Stream:
        if which:
            return super().__new__(cls, priority=priority, **which)
        _simulated.initialise()
        return super().__new__(cls, device=_device(device), priority=priority)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)


def _stream(device: torch.device | str | int | None, of_index: Any) -> Stream:
    _simulated.initialise()
    index = _device(device).index
    kind = int(torch._C._autograd.DeviceType.PrivateUse1)
    return Stream(stream_id=of_index(index), device_index=index, device_type=kind)


def current_stream(device: torch.device | str | int | None = None) -> Stream:
    return _stream(device, _simulated.current_stream)


def default_stream(device: torch.device | str | int | None = None) -> Stream:
    return _stream(device, lambda index: 0)


def set_stream(stream: Stream) -> None:
    _simulated.set_stream(stream.device_index, stream.stream_id)


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Work meanwhile goes to this stream, and its device is the current one; None changes nothing."""
    if stream is None:
        yield
        return
    before, device = current_stream(stream.device), _simulated.current_device()
    _simulated.set_device(stream.device_index)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)
        _simulated.set_device(device)
