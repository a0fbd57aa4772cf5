"""Python and the packages that programs run with."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator

from npu_runtime.devices.doctor.check import Check, release
from npu_runtime.devices.doctor.machine import Machine, Package, installed_version, look
from npu_runtime.errors import UnavailableError, first_line

PYTHONS = ((3, 10), (3, 13))
"""The oldest and the newest that are supported."""

ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-cann",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-training",
)
"""Distributions that install the module `onnxruntime`."""

NMS = "operator torchvision::nms does not exist"
"""What torchvision raises beside a torch that it was not compiled for."""

EXPORTER = {
    "timm": ("1.0.16", "npu-export and the backend eager need it; programs run without"),
    "transformers": ("4.50", "only the exporter's tests need it, to compare with"),
}
"""Package of the exporter -> the oldest supported, and what needs it."""


def check_python(machine: Machine) -> Iterator[Check]:
    oldest, newest = PYTHONS
    supported = oldest <= sys.version_info[:2] <= newest
    advice = f"use Python {_spell(oldest)} to {_spell(newest)}"
    yield Check(
        "python",
        "ok" if supported else "warn",
        f"{platform.python_version()}, {platform.machine()}",
        None if supported else advice,
    )


def check_torch(machine: Machine) -> Iterator[Check]:
    torch = machine.torch
    if not torch.installed:
        yield Check("torch", "absent", "not installed", "TorchScript programs need it: pip install 'npu-export[torch]'")
    elif torch.error is not None:
        yield _broken("torch", torch, torch.error)
    else:
        yield _aged("torch", torch.told(), "2.7")


def check_torch_build(machine: Machine) -> Iterator[Check]:
    torch, cuda = machine.torch, machine.torch_cuda
    if not torch.installed:
        yield Check("torch build", "absent", "no torch")
    elif cuda is not None and machine.torch_npu.installed:
        public = (torch.version or "VERSION").partition("+")[0]
        yield Check(
            "torch build",
            "fail",
            f"CUDA {cuda} beside torch_npu: two accelerators cannot be used at the same time",
            f"install torch=={public}+cpu, the CPU build, from PyTorch's own package index",
        )
    else:
        yield Check("torch build", "ok", "without CUDA" if cuda is None else f"CUDA {cuda}")


def check_torch_npu(machine: Machine) -> Iterator[Check]:
    package = machine.torch_npu
    if not package.installed:
        advice = "an Ascend NPU needs it, of the release X.Y of torch: pip install 'npu-export[npu]'"
        yield Check("torch_npu", "absent", "not installed", advice)
    elif package.error is not None:
        yield _broken("torch_npu", package, package.error)
    else:
        yield Check("torch_npu", "ok", f"{package.told()}, beside torch {machine.torch.told()}")


def check_onnxruntime(machine: Machine) -> Iterator[Check]:
    here = {name: known for name in ONNXRUNTIMES if (known := installed_version(name)) is not None}
    package = machine.onnxruntime
    told = ", ".join(f"{name} {known}" for name, known in here.items())
    if len(here) > 1:
        yield Check(
            "onnxruntime",
            "fail",
            f"{told}: they overwrite each other's module onnxruntime",
            f"pip uninstall -y {' '.join(here)}, then install the one that is wanted",
        )
    elif not package.installed:
        yield Check("onnxruntime", "absent", "not installed", "ONNX programs need it: pip install 'npu-export[onnx]'")
    elif package.error is not None:
        yield _broken("onnxruntime", package, package.error)
    else:
        yield _providers(told or package.told())


def check_numpy(machine: Machine) -> Iterator[Check]:
    numpy = installed_version("numpy") or "0"
    cann = installed_version("onnxruntime-cann")
    if cann is not None and release(numpy) >= (2,):
        found = f"{numpy} beside onnxruntime-cann {cann}, which is compiled for numpy 1"
        yield Check("numpy", "fail", found, "pip install 'numpy<2'")
    else:
        yield Check("numpy", "ok", numpy)


def check_torchvision(machine: Machine) -> Iterator[Check]:
    known, torch = installed_version("torchvision"), machine.torch
    if not torch.imports:
        yield Check("torchvision", "absent", "not installed" if known is None else f"{known}, not tried without torch")
        return
    package = look("torchvision", "torchvision", lambda: importlib.import_module("torchvision"))
    if not package.installed:
        yield Check("torchvision", "absent", "not installed")
    elif package.error is None:
        yield Check("torchvision", "ok", package.told())
    elif NMS in str(package.error):
        yield Check(
            "torchvision",
            "warn",
            f"{package.told()} is compiled for another torch than {torch.told()}",
            "the exporter copes with it; to mend it, install torchvision from where this torch comes from",
        )
    else:
        advice = f"timm imports it: install the torchvision of torch {torch.told()}"
        yield Check("torchvision", "warn", _broken("torchvision", package, package.error).found, advice)


def check_exporter(machine: Machine) -> Iterator[Check]:
    for name, (oldest, needed) in EXPORTER.items():
        known = installed_version(name)
        yield Check(name, "absent", "not installed", needed) if known is None else _aged(name, known, oldest)


def _providers(told: str) -> Check:
    import onnxruntime

    try:
        providers = onnxruntime.get_available_providers()
    except AttributeError:
        # What is left of the module when one of two distributions was uninstalled.
        return Check("onnxruntime", "fail", f"{told}, an empty module", "uninstall and install it again")
    note = None
    if "CANNExecutionProvider" in providers:
        note = "CANNExecutionProvider is listed without CANN as well; only a run on --device npu:0 tells"
    return Check("onnxruntime", "ok", f"{told}: {', '.join(providers)}", note)


def _aged(name: str, known: str, oldest: str) -> Check:
    if release(known) >= release(oldest):
        return Check(name, "ok", known)
    return Check(name, "warn", known, f"{oldest} is the oldest that is supported: pip install -U '{name}>={oldest}'")


def _broken(name: str, package: Package, error: UnavailableError) -> Check:
    cause = error.got or ""
    parts = [error.what] if cause in error.what else [error.what, first_line(cause)]
    return Check(name, "fail", ": ".join([package.told(), *parts]), error.hint)


def _spell(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
