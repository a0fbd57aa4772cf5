"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from npu_runtime.devices import Device, cpu_count

PACKAGES = ("torch", "torch-npu", "timm", "onnxruntime", "numpy")
VARIABLES = (
    "PYTHON_CPU_COUNT",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MALLOC_CONF",
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ASCEND_LAUNCH_BLOCKING",
    "TASK_QUEUE_ENABLE",
    "CPU_AFFINITY_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_NPU_ALLOC_CONF",
    "TORCH_NPU_FALLBACK_CPU_DISABLE",
    "TORCH_NPU_USE_COMPATIBLE_IMPL",
)
"""Environment variables that change how fast or how exactly programs run."""


@dataclass(frozen=True, slots=True)
class AcceleratorRecord:
    """What a program ran on beside the host."""

    name: str | None
    """As the device's package tells it: of an NPU the SoC; None where it tells none."""
    software: str | None
    """The version of CANN, or of the CUDA that torch is built for; None where none is told."""


def describe_environment() -> dict[str, object]:
    """Machine, system and versions, found without importing any of the packages.

    `load_average_1min` is that of now, so a measurement asks before it begins; `variables` holds those of
    VARIABLES that are set.
    """
    return {
        "host": platform.node(),
        "processor": _processor(),
        "machine": platform.machine(),
        "cores_usable": cpu_count(),
        "system": platform.platform(),
        "load_average_1min": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def describe_accelerator(device: Device) -> AcceleratorRecord | None:
    """The accelerator behind a device on which programs run; None for the CPU."""
    if device.kind == "cpu":
        return None
    from npu_runtime.devices.doctor.ascend import check_cann
    from npu_runtime.devices.doctor.machine import Machine

    machine = Machine()
    software = machine.torch_cuda if device.kind == "cuda" else next(check_cann(machine)).found
    return AcceleratorRecord(machine.probe(device).name, software)


def package_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Version by package, those not installed left out."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    """The model name that Linux gives, which `platform.processor` leaves empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
