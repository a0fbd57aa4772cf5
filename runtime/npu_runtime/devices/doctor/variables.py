"""Environment variables that change whether, how fast and how exactly programs run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from npu_runtime.devices.cann import LIBRARY, library_folder, source_environment
from npu_runtime.devices.cores import cpu_count
from npu_runtime.devices.doctor.check import Check, VariableCheck, Verdict, release
from npu_runtime.devices.doctor.machine import Machine


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable, and what is wrong with a value of it."""

    name: str
    does: str
    advised: str
    refuse: Callable[[str | None], str | None]
    """Value, None where it is not set -> what to do; None where it is fine."""
    verdict: Verdict = "warn"
    """Of a value that is not fine."""


def refuse_visible(value: str | None) -> str | None:
    """What to do about a value of ASCEND_RT_VISIBLE_DEVICES; CANN reads it up to the first thing it does not take."""
    if value is None:
        return None
    if not value.strip():
        return "it hides every NPU: unset it, or name devices as in 0,1"
    parts = value.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        return "name devices by whole numbers with commas and nothing else between, as in 0,1"
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        return f"name each device once: {_in_order(numbers)}"
    if numbers != sorted(numbers):
        return f"name devices in ascending order: {_in_order(numbers)}"
    return None


def _in_order(numbers: list[int]) -> str:
    return ",".join(str(number) for number in sorted(set(numbers)))


def _refuse(advice: dict[str, str]) -> Callable[[str | None], str | None]:
    return lambda value: advice.get("" if value is None else value.strip().lower())


def _refuse_queue(value: str | None) -> str | None:
    """torch_npu raises for other numbers, and takes what is no number for 0."""
    advice = {
        "0": "unset it: with the queue, one thread prepares operators while another launches them",
        "1": None,
        "2": "set it to 1, for no graph is captured with 2; it helps only where none would be replayed",
    }
    return None if value is None else advice.get(value.strip(), "set it to 1: torch_npu takes 0, 1 and 2")


def _refuse_threads(value: str | None) -> str | None:
    if value is None:
        return None
    if not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", value):
        return "give a whole number of threads, or unset it"
    if int(value.partition(",")[0]) > cpu_count():
        return f"this process may use {cpu_count()} cores; more threads get in each other's way"
    return None


def _refuse_libraries(value: str | None) -> str | None:
    return None if library_folder(value) else f"no {LIBRARY} in any of its folders: {source_environment()}"


VARIABLES = (
    Variable(
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
        "0: import torch leaves torch_npu alone",
        "unset",
        _refuse({}),
    ),
    Variable(
        # Read by the wheels 2.7.1.post11, 2.9.0.post9, 2.10.0.post7, 2.11.0.post3, 2.12.0.post3, 2.13.0 and 2.14.0;
        # not by 2.9.0.post8, 2.12.0, nor any of 2.8.
        "TORCH_NPU_FALLBACK_CPU_DISABLE",
        "1: no operator without a kernel runs on the CPU",
        "1, as npu-runtime sets it",
        _refuse({"0": "set it to 1: operators without a kernel would run on the CPU unasked"}),
    ),
    Variable(
        "TORCH_NPU_USE_COMPATIBLE_IMPL",
        "1: operators as torch defines them, exact GELU",
        "1, as npu-runtime asks",
        _refuse({}),
    ),
    Variable(
        "TASK_QUEUE_ENABLE",
        "queue of operators; 2 forbids graph capture",
        "1, the default",
        _refuse_queue,
    ),
    Variable("CPU_AFFINITY_CONF", "2: pins torch_npu's busiest threads to cores", "2", _refuse({})),
    Variable(
        "PYTORCH_NPU_ALLOC_CONF",
        "expandable segments fragment memory less",
        "expandable_segments:True",
        _refuse({"expandable_segments:false": "set it to expandable_segments:True"}),
    ),
    Variable("PYTORCH_ALLOC_CONF", "the same, since torch_npu 2.10", "unset", _refuse({})),
    Variable(
        "ASCEND_LAUNCH_BLOCKING",
        "1: each operator waits until it is done",
        "unset",
        _refuse({"1": "unset it once the error is found: it slows everything and turns the task queue off"}),
    ),
    Variable(
        "ASCEND_RT_VISIBLE_DEVICES",
        "which NPUs are seen, npu:0 the first of them",
        "unset, or as 0,1",
        refuse_visible,
        verdict="fail",
    ),
    Variable("LD_LIBRARY_PATH", "where CANN's libraries are looked for", "as set_env.sh sets it", _refuse_libraries),
)
"""Those of the NPU."""

ALLOCATORS = ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Of which one may be set. Since the wheels 2.10.0.post7, 2.11.0.post3, 2.12.0.post3 and 2.13.0 a second one stops
torch_npu; 2.9 reads the first alone."""

THREADS = Variable("OMP_NUM_THREADS", "CPU threads of one operator", "unset", _refuse_threads)


def check_variables(machine: Machine) -> Iterator[Check]:
    npu = machine.torch_npu.installed
    for variable in VARIABLES:
        # A list of devices that cannot be meant is told on every machine.
        check = _check(variable, machine.environ.get(variable.name), applies=npu or variable.verdict == "fail", npu=npu)
        both = all(name in machine.environ for name in ALLOCATORS)
        if both and variable.name == ALLOCATORS[1] and release(machine.torch_npu.version or "") >= (2, 10):
            advice = f"unset {ALLOCATORS[0]}: torch_npu stops at the first tensor where both are set"
            check = replace(check, verdict="fail", advice=advice)
        yield check
    yield _check(THREADS, machine.environ.get(THREADS.name), applies=True, npu=True)


def _check(variable: Variable, value: str | None, *, applies: bool, npu: bool) -> VariableCheck:
    advice = variable.refuse(value) if applies else None
    fine: Verdict = "ok" if npu else "absent"
    shown = "unset" if value is None else value or "empty"
    if variable.name == "LD_LIBRARY_PATH" and value:
        shown = library_folder(value) or f"no {LIBRARY} in it"
    verdict = variable.verdict if advice else fine
    return VariableCheck(variable.name, verdict, shown, advice, variable.does, variable.advised)
