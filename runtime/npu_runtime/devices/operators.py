"""Which operators a program runs on a device, and which of them would run on the CPU instead.

What torch_npu 2.9 and 2.13 do, as their source says: an operator without a kernel of theirs goes to npu_cpu_fallback
(torch_npu/csrc/aten/VariableFallbackKernel.cpp), which warns once in a process, through a handler of its own that
writes to stderr and never to Python's `warnings`. Builds that know TORCH_NPU_FALLBACK_CPU_DISABLE raise instead where
it is 1; they read it at the first such operator, and keep it. torch's table of kernels shows these operators in all.

Not found are operators with a kernel of torch_npu that computes on the CPU itself. op-plugin has some (op_plugin/ops:
complex, polar, sinc, gcd, isin, nanmedian, adaptive_max_pool3d, std and var of some dtypes). Most say so on stderr, std
and var do not, and of all such kernels the variable stops two, of sparse tensors. No encoder here runs any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from npu_runtime.devices.device import Device
from npu_runtime.devices.failures import is_failure
from npu_runtime.devices.observed import Call, Observer
from npu_runtime.errors import ProgramError, UnavailableError, first_line

COMPOSITE_KEYS = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")
"""torch's keys of kernels that call other operators, and so run wherever those do."""
STRUCTURED_KEY = "CompositeExplicitAutogradNonFunctional"
"""torch's key of kernels that make an output and call the operator's overload that fills it, where there is one."""
_REFUSED = re.compile(r"operator '([\w:]+)[\w.]*' would execute its main computation on CPU")
"""What torch_npu raises; the name of the overload behind the dot is left out."""
_NOT_IN_CANN = re.compile(r"(aclnn\w+) or \w+GetWorkspaceSize not in (\S+),")
"""What torch_npu raises for an operator that it knows and the installed CANN does not."""


@dataclass(frozen=True, slots=True)
class Operators:
    """The operators of one run of a program."""

    names: frozenset[str]
    fallback: tuple[str, ...]
    """Those that ran on the CPU, with copies there and back, for want of a kernel."""
    host: tuple[str, ...]
    """Those that made tensors on the CPU that others took: device literals that were baked into the program."""
    calls: Mapping[str, Call]
    """The largest call of each measured kind."""


def watch_operators(
    device: Device, call: Callable[[], Sequence[torch.Tensor]]
) -> tuple[Operators, Sequence[torch.Tensor]]:
    """Run a program once; returns what it ran and its outputs. Raises ProgramError when it mixes devices or does not
    run, and failures of the device (`is_failure`) as torch raised them.

    An operator falls back when torch's table of kernels has none for the device, or when torch_npu refuses it.
    """
    mode = _Watch(device)
    try:
        with torch.no_grad(), mode:  # inference mode would hide what composite operators call
            outputs = call()
    except RuntimeError as error:
        cause = mode.error or error  # TorchScript's interpreter keeps little of it
        if is_failure(cause):
            raise cause from None
        raise _explain(cause, mode, device) from cause
    astray = [str(tensor.device) for tensor in outputs if tensor.device != torch.device(str(device))]
    if astray:
        raise ProgramError(
            "the program's outputs lie on another device",
            expected=str(device),
            got=", ".join(astray),
            hint="a device literal was baked into it; export it again",
        )
    found = Operators(frozenset(mode.names), tuple(mode.fallback), tuple(mode.host), mode.observer.calls)
    return found, outputs


def refuse_fallback(operators: Operators, device: Device) -> None:
    """Raise UnavailableError naming the operators that would run on the CPU."""
    if operators.fallback:
        raise _no_kernel(device, operators.fallback)
    if operators.host:
        raise ProgramError(
            "the program makes tensors on the CPU while it runs",
            expected=f"every tensor on {device}",
            got=", ".join(operators.host),
            hint="a device literal was baked into it: export it again; --allow-fallback runs it all the same",
        )


class _Watch(TorchDispatchMode):
    """Notes each operator and runs it."""

    def __init__(self, device: Device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[str, None] = {}
        self.fallback: dict[str, None] = {}
        self.host: dict[str, None] = {}
        self.observer = Observer()
        self._made: dict[int, tuple[str, torch.Tensor]] = {}
        self.last = ""
        self.error: RuntimeError | None = None  # as it was raised
        self._key = getattr(torch._C.DispatchKey, device.traits.dispatch_key)
        self._accelerated = device.kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.last = func.name().partition(".")[0]
        self.names[self.last] = None
        taken = _tensors((args, kwargs or {}))
        self.host.update((self._made[_memory(t)][0], None) for t in taken if _memory(t) in self._made)
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            self.error = error
            raise
        if any(t.device.type == self._accelerated for t in taken):
            self.observer.see(func, args, kwargs or {}, result)
            if not self._has_kernel(func):
                self.fallback[self.last] = None
        # A number that became a tensor has no dimension and may lie on the CPU anywhere. What nothing takes costs
        # nothing: torch_npu's attention gives a seed and an offset, on the CPU, that only its backward reads.
        for tensor in _tensors(result):
            if tensor.device.type == "cpu" and tensor.dim():
                self._made.setdefault(_memory(tensor), (self.last, tensor))  # kept, or its address is used again
        return result

    def _has_kernel(self, func: Any) -> bool:
        keys = [self._key, *(getattr(torch._C.DispatchKey, key) for key in COMPOSITE_KEYS)]
        if any(func.has_kernel_for_dispatch_key(key) for key in keys):
            return True
        if not func.has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, STRUCTURED_KEY)):
            return False
        packet = func.overloadpacket
        overloads = [getattr(packet, name) for name in packet.overloads() if name.endswith("out")]
        return not overloads or any(overload.has_kernel_for_dispatch_key(self._key) for overload in overloads)


def _memory(tensor: torch.Tensor) -> int:
    """The same for a tensor and its views."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _no_kernel(device: Device, names: Sequence[str]) -> UnavailableError:
    return UnavailableError(
        f"{device} has no kernel for operators of this program, which would run on the CPU",
        expected=f"every operator on {device}",
        got=", ".join(names),
        hint="another backend or another torch-npu may have them; --allow-fallback runs it all the same",
    )


def _explain(cause: RuntimeError, mode: _Watch, device: Device) -> ProgramError | UnavailableError:
    """The error of a first run: an operator that was refused, devices that were mixed, or what it is."""
    text = str(cause)
    refused = _REFUSED.search(text)
    if refused:
        return _no_kernel(device, [refused[1]])
    missing = _NOT_IN_CANN.search(text)
    if missing:
        return UnavailableError(
            "this CANN lacks an operator of the program",
            where=mode.last or None,
            expected=f"{missing[1]} in {missing[2]}",
            hint="install the CANN that torch-npu's release notes name, with its operators, and source its set_env.sh",
        )
    mixed = "same device" in text or "found at least two devices" in text
    return ProgramError(
        "the program mixes devices" if mixed else f"the program does not run on {device}",
        where=mode.last or None,
        expected=f"every tensor on {device}" if mixed else None,
        got=first_line(cause),
        hint="a device literal or a constant of the CPU is baked into it; export it again" if mixed else None,
    )
