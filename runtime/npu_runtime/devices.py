"""Devices that a program runs on. Everything else asks here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from npu_runtime.errors import UnavailableError, UsageError

_SPELLING = re.compile(r"(cpu)|(cuda|npu)(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device and which one of it."""

    kind: str
    index: int | None
    """None for the CPU, which is one."""

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


CPU = Device("cpu", None)


def parse_device(text: str) -> Device:
    """`cpu`, `cuda`, `cuda:N`, `npu` or `npu:N`; raises UsageError for anything else."""
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise UsageError("unknown device", expected="cpu, cuda:N or npu:N", got=repr(text))
    cpu, kind, index = match.groups()
    return CPU if cpu else Device(kind, int(index or 0))


def require_device(text: str) -> Device:
    """The device, ready for programs. Raises UnavailableError, with what to do, where it cannot run them."""
    device = parse_device(text)
    if device.kind != "cpu":
        raise UnavailableError(
            f"this version runs programs on the CPU only, not on {device}",
            expected="device cpu",
            got=f"device {device}",
            hint="model.ts and the ONNX graphs hold no device literal: open them there with torch.jit.load"
            f'(path, map_location="{device}") or onnxruntime',
        )
    return device


def cpu_count() -> int:
    """Cores that this process may use, which a container or taskset may have made fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
