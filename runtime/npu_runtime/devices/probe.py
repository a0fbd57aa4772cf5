"""Whether a device can run programs, and what to do where it cannot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from npu_runtime.devices.cann import advise_start, read_cann_error
from npu_runtime.devices.device import CPU, Device, parse_device
from npu_runtime.devices.torch_import import import_torch, import_torch_npu
from npu_runtime.errors import UnavailableError, first_line


@dataclass(frozen=True, slots=True)
class Probe:
    """What is known of a device on this machine."""

    device: str
    name: str | None
    """The product's name; None where the device is not available, and for the CPU."""
    error: UnavailableError | None
    """Why programs cannot run on it and what to do; None where they can."""

    @property
    def available(self) -> bool:
        return self.error is None


def probe_device(device: Device) -> Probe:
    """Start the device's package and look; absence is an answer and never raises."""
    if device == CPU:
        return Probe(str(device), None, None)
    try:
        return Probe(str(device), _start(device), None)
    except UnavailableError as error:
        return Probe(str(device), None, error)


def require_device(text: str) -> Device:
    """The device, ready for programs. Raises UnavailableError, with what to do, where it cannot run them."""
    device = parse_device(text)
    error = probe_device(device).error
    if error is not None:
        raise error
    return device


_SPAWN = "load the encoder in the process that uses it, or start that by multiprocessing.get_context('spawn')"
_started: dict[str, int] = {}
"""Kind of device -> the process that started it. After os.fork torch_npu hangs; it notices multiprocessing alone."""


def _start(device: Device) -> str:
    """The device's name, its package imported and its index checked."""
    if _started.get(device.kind, os.getpid()) != os.getpid():
        raise UnavailableError(f"the process was forked after {device} was started", hint=_SPAWN)
    if device.kind == "npu":
        import_torch_npu()
    try:
        import_torch()
    except ImportError as error:
        raise UnavailableError(
            f"the device {device} needs the package torch, which is not installed",
            hint="pip install 'npu-export[torch]'",
        ) from error
    import torch

    module = getattr(torch, device.kind)
    try:
        name = _find(device, module)
        module.synchronize(device.index)  # a device that is listed may be lost or in use
    except RuntimeError as error:
        raise _not_started(device, error) from error
    _started[device.kind] = os.getpid()
    return name


def _not_started(device: Device, error: RuntimeError) -> UnavailableError:
    failed = read_cann_error(error)
    hint = "npu-runtime doctor says what is missing; --device cpu runs without"
    if "forked subprocess" in str(error):
        hint = _SPAWN
    elif device.kind == "npu":
        code = None if failed is None else failed.code
        hint = advise_start(code, visible=device.traits.visible_variable in os.environ)
    got = first_line(error) if failed is None else failed.text
    return UnavailableError(f"{device} does not start", got=got, hint=hint)


def _find(device: Device, module: Any) -> str:
    """The device's name, its index checked against those that torch's module for its kind sees."""
    import torch

    variable = device.traits.visible_variable or ""
    selected = os.environ.get(variable)
    seen = "" if selected is None else f", {variable}={selected}"
    count = module.device_count() if module.is_available() else 0
    if not count:
        built = device.kind != "cuda" or torch.version.cuda is not None
        raise UnavailableError(
            f"torch sees no {device.kind} device on this machine",
            expected=f"device {device}",
            got=f"0 devices{seen}" if built else f"torch {torch.__version__}, which is built without CUDA",
            hint="npu-runtime doctor says what is missing; --device cpu runs without",
        )
    if device.index is None or device.index >= count:
        raise UnavailableError(
            "there is no device of this index",
            expected=", ".join(f"{device.kind}:{index}" for index in range(count)),
            got=f"{device}{seen}",
        )
    return str(module.get_device_name(device.index))
