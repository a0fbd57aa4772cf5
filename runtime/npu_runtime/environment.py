"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from npu_runtime.devices import cpu_count

PACKAGES = ("torch", "torch-npu", "timm", "onnxruntime", "numpy")


def describe_environment() -> dict[str, object]:
    """Machine, system and versions, found without importing any of the packages."""
    return {
        "processor": _processor(),
        "machine": platform.machine(),
        "cores_usable": cpu_count(),
        "system": platform.platform(),
        "load_average_1min": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
    }


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
