"""Failures of an accelerator that no program is to blame for: too little memory, and a device that stopped working.

The texts are torch_npu 2.13's (torch_npu/csrc/core/npu: NPUCachingAllocator.cpp, NPUWorkspaceAllocator.cpp,
NPUException.h, NPUQueue.cpp) and torch's for CUDA.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator

from npu_runtime.devices.accelerator import Accelerator
from npu_runtime.devices.cann import log_folder, message_lines
from npu_runtime.devices.device import Device
from npu_runtime.errors import Error, UnavailableError, first_line

_ASKED = re.compile(r"tried to allocate ([\d.]+ ?(?:bytes|[KMGT]iB))", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|error code(?: is |:) ?(?:207001|207018)\b", re.IGNORECASE)
"""207001 and 207018: ACL_ERROR_RT_MEMORY_ALLOCATION and ACL_ERROR_RT_DEVICE_OOM."""
_CODE = re.compile(r"error code(?: is |:) ?([125]07\d{3})\b")
"""Of AscendCL's runtime, whose 107… are states, 207… resources and 507… the device; an operator's are 161… and 561…."""
_MEANING = re.compile(r"\[Error\]: (.+)")
_QUEUE = re.compile(r"The Inner error is reported as above\. The process exits for this inner error, and (.+?)\.\n")
"""Of what torch_npu's task queue was asked for before, such as an operator's launch: the code is on stderr alone."""
_OF_THE_QUEUE = ("The Inner error", "Since the operator", "Note: ASCEND_LAUNCH_BLOCKING")
_CUDA = re.compile(r"CUDA error: (.+)")


def is_failure(error: BaseException) -> bool:
    """Whether an error is the device's own and not the program's."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(p.search(text) for p in (_MEMORY, _CODE, _QUEUE, _CUDA))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def failures_of(accelerator: Accelerator, *, where: str | None = None, memory_hint: str) -> Iterator[None]:
    """Raise the device's own failures inside as UnavailableError; other errors pass.

    `where` is what was being done, and `memory_hint` what to do where the memory was too little. Once a device has
    stopped working, this raises at its beginning: nothing is to be read from it any more in this process.
    """
    device = accelerator.device
    if device in _STOPPED:
        raise _STOPPED[device]
    try:
        yield
    except (RuntimeError, Error) as error:
        if device in _STOPPED:  # found further inside
            raise
        require_computing(accelerator, error, where=where)
        if is_out_of_memory(error):
            raise _too_little_memory(error, accelerator, where, memory_hint) from error
        if is_failure(error):
            raise _stop(error, device, where) from error
        raise


def require_computing(accelerator: Accelerator, error: BaseException, *, where: str | None) -> None:
    """After an error: raise UnavailableError where the device runs no operator any more.

    After an error in its task queue torch_npu drops whatever it is asked to run, in silence, and results are what the
    memory held before (Repository::Enqueue in torch_npu/csrc/core/npu/NPUQueue.cpp; seen on 2.13).
    """
    if not _computes(accelerator):
        raise _stop(error, accelerator.device, where) from error


_STOPPED: dict[Device, UnavailableError] = {}
"""What is raised for devices that stopped working. torch_npu keeps that state for the process, and so does this."""


def _stop(error: BaseException, device: Device, where: str | None) -> UnavailableError:
    """The error to raise now; from now on the device is refused."""
    stopped = _stopped_working(error, device, where)
    _STOPPED[device] = UnavailableError(
        f"{device} stopped working earlier in this process", where=where, got=stopped.got, hint=stopped.hint
    )
    return stopped


def _computes(accelerator: Accelerator) -> bool:
    """Whether the sum of two numbers that no memory holds comes back from the device."""
    import torch

    numbers = [random.getrandbits(20) for _ in range(4)]
    try:
        on_device = torch.tensor(numbers, dtype=torch.float32, device="cpu").to(accelerator.torch_device)
        return (on_device + on_device).cpu().tolist() == [2 * number for number in numbers]
    except RuntimeError as error:
        return is_out_of_memory(error)


@contextlib.contextmanager
def ending_whatever_failed() -> Iterator[None]:
    """Let failures of the device pass, of which whoever used it was told, while memory is given back to it."""
    try:
        yield
    except RuntimeError as error:
        if not is_failure(error):
            raise


def _too_little_memory(
    error: BaseException, accelerator: Accelerator, where: str | None, hint: str
) -> UnavailableError:
    asked = _ASKED.search(str(error))
    try:
        memory = accelerator.memory()
        found = f"{_mib(memory.free_nbytes)} free of {_mib(memory.total_nbytes)}; this process's tensors hold "
        found += _mib(memory.allocated_nbytes)
    except RuntimeError:
        found = first_line(error)
    return UnavailableError(
        f"{accelerator.device} has too little free memory",
        where=where,
        expected=None if asked is None else f"{asked[1]} more",
        got=found,
        hint=hint,
    )


def _stopped_working(error: BaseException, device: Device, where: str | None) -> UnavailableError:
    text = str(error)
    code, meaning, queued = _CODE.search(text), _MEANING.search(text), _QUEUE.search(text)
    if code is not None:
        got = f"error code {code[1]}" + (f": {meaning[1].strip()}" if meaning else "")
    elif queued is not None:
        own = [line for line in message_lines(text) if not line.startswith(_OF_THE_QUEUE)]  # what CANN says of it
        got = f"{queued[1]}: {own[0] if own else 'CANN says why on stderr'}"
    else:
        got = first_line(error)
    tool = f"npu-smi info and CANN's log ({log_folder()}) tell" if device.kind == "npu" else "nvidia-smi tells"
    return UnavailableError(
        f"{device} stopped working",
        where=where,
        got=got,
        hint=f"{tool} more; start the process again, on another device if this one is lost",
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
