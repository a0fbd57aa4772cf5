"""Which devices there are, and which of them run programs."""

from __future__ import annotations

from collections.abc import Iterator

from npu_runtime.devices.cann import CONTAINER
from npu_runtime.devices.cores import cpu_count
from npu_runtime.devices.device import CPU, KINDS, Device
from npu_runtime.devices.doctor.check import Check, Verdict
from npu_runtime.devices.doctor.machine import Machine
from npu_runtime.devices.doctor.variables import refuse_visible
from npu_runtime.devices.probe import Probe
from npu_runtime.errors import UnavailableError

ACCELERATORS = tuple(kind for kind in KINDS.values() if kind.visible_variable is not None)


def check_visible(machine: Machine) -> Iterator[Check]:
    seen = []
    for kind in ACCELERATORS:
        count, variable = machine.count(kind.name), kind.visible_variable or ""
        selected = machine.environ.get(variable)
        if count or selected is not None:
            seen.append(f"{count} {kind.name}, {variable} {'unset' if selected is None else repr(selected)}")
    found = "; ".join(seen) or "none but the CPU"
    selected = machine.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    advice = refuse_visible(selected)
    named = len(selected.split(",")) if selected else 0
    if advice is not None:
        yield Check("visible devices", "fail", found, f"ASCEND_RT_VISIBLE_DEVICES: {advice}")
    elif 0 < machine.count("npu") < named:
        advice = f"ASCEND_RT_VISIBLE_DEVICES names {named}: leave out those that npu-smi info does not list"
        yield Check("visible devices", "warn", found, advice)
    else:
        yield Check("visible devices", "ok", found)


def probe_devices(machine: Machine, asked: Device | None) -> dict[str, Probe]:
    """Every device that is seen, the first of a kind where none is, and the one that was asked for."""
    devices = [CPU]
    for kind in ACCELERATORS:
        devices += [Device(kind.name, index) for index in range(machine.count(kind.name) or 1)]
    if asked is not None and asked not in devices:
        devices.append(asked)
    return {str(device): _probe(machine, device) for device in devices}


def check_devices(machine: Machine, probes: dict[str, Probe], asked: Device | None) -> Iterator[Check]:
    for name, probe in probes.items():
        if probe.error is None:
            found = f"{cpu_count()} cores, {' and '.join(_formats(machine))}" if name == "cpu" else probe.name or name
            yield Check(name, "ok", found)
        else:
            wanted = name in ("cpu", str(asked)) or (name.startswith("npu") and machine.torch_npu.installed)
            verdict: Verdict = "fail" if wanted else "absent"
            cause = probe.error.got if probe.error.what.endswith("does not start") else None
            yield Check(name, verdict, ": ".join(filter(None, (probe.error.what, cause))), probe.error.hint)


def _probe(machine: Machine, device: Device) -> Probe:
    if device == CPU:
        return Probe(str(CPU), None, None if _formats(machine) else _without_backends(machine))
    probe = machine.probe(device)
    if probe.error is None or "npu-runtime doctor" not in (probe.error.hint or ""):
        return probe
    error = probe.error
    named = UnavailableError(error.what, expected=error.expected, got=error.got, hint=_advise(machine, device))
    return Probe(probe.device, None, named)


def _advise(machine: Machine, device: Device) -> str:
    """What to do where torch imports and sees no device."""
    variable = device.traits.visible_variable
    if variable is not None and variable in machine.environ:
        return f"unset {variable}, or name devices that are there"
    if device.kind == "npu":
        return f"npu-smi info says whether the driver sees one; {CONTAINER}"
    if machine.torch_npu.installed:
        return "CUDA cannot be used beside torch_npu; run on npu:0 or on the CPU"
    if machine.torch_cuda is None:
        return "install a CUDA build of torch"
    return "nvidia-smi says whether the driver sees one"


def _formats(machine: Machine) -> list[str]:
    """Formats of programs for which there is a backend that imports."""
    packages = {"onnx": machine.onnxruntime, "torchscript": machine.torch}
    return [name for name, package in packages.items() if package.imports]


def _without_backends(machine: Machine) -> UnavailableError:
    broken = machine.onnxruntime.error or machine.torch.error
    return UnavailableError(
        "neither onnxruntime nor torch is here to run programs on the CPU",
        got=None if broken is None else broken.what,
        hint="pip install 'npu-export[onnx]' or 'npu-export[torch]'" if broken is None else broken.hint,
    )
