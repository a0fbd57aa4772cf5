"""The backends by name: the built-in ones, and those that other packages add by entry point."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from npu_runtime.artifact.schema import Manifest
from npu_runtime.backends.base import Backend
from npu_runtime.devices import Device
from npu_runtime.errors import ArtifactError, UnavailableError, UsageError

EAGER = "eager"
"""The backend of the unmodified network, which the exporter adds."""
ENTRY_POINT_GROUP = "npu_runtime.backends"

BUILT_IN = {
    "onnxruntime": "npu_runtime.backends.onnxruntime:OnnxRuntimeBackend",
    "torchscript": "npu_runtime.backends.torchscript:TorchScriptBackend",
}

FORMATS = {"onnx": "onnxruntime", "torchscript": "torchscript"}
"""Format of a program -> the built-in backend that opens it."""

ORDER = {"cpu": ("onnx", "torchscript"), "cuda": ("torchscript", "onnx"), "npu": ("torchscript", "onnx")}
"""Kind of device -> formats, the first that the artifact holds is run."""


def backend_names() -> list[str]:
    """Every backend that can be asked for, whether or not its packages are installed."""
    return [*BUILT_IN, *(name for name in _added() if name not in BUILT_IN)]


def backend_name(name: str) -> str:
    """The backend that a name means, where a format stands for the one that opens it."""
    return FORMATS.get(name, name)


def find_backend(name: str) -> Backend:
    """The backend of a name or of a format; raises UsageError for an unknown one."""
    name = backend_name(name)
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        backend: Backend = getattr(importlib.import_module(module), attribute)()
        return backend
    added = _added()
    if name not in added:
        raise UsageError(
            f"unknown backend {name!r}",
            expected=", ".join(backend_names()),
            hint="eager comes with pip install 'npu-export[export]'" if name == "eager" else None,
        )
    try:
        factory = added[name]()
    except ImportError as error:
        raise UnavailableError(
            f"the backend {name} is registered but does not import", got=error, hint="install what it needs"
        ) from error
    return factory()


def require_replay(name: str, device: Device) -> None:
    """Raise UsageError where a backend cannot replay graphs on a device, which `graph=True` asks for.

    Nothing is opened, and the device need not be here.
    """
    require_accelerator(device)
    if not getattr(find_backend(name), "replays_graphs", True):
        raise UsageError(
            f"the backend {backend_name(name)} replays no graphs",
            expected="graph replay with torchscript or eager",
            got=f"graph replay with {backend_name(name)} on {device}",
        )


def require_eager_for(weights: str | None) -> None:
    """Raise UnavailableError where a checkpoint is named that only eager would read, and eager is not installed."""
    if weights is not None and EAGER not in backend_names():
        raise UnavailableError(
            "--weights is for eager, which is not installed",
            got=f"--weights {weights}",
            hint="eager comes with pip install 'npu-export[export]'",
        )


def require_accelerator(device: Device) -> None:
    """Raise UsageError for graph replay on the CPU, which has none."""
    if device.kind == "cpu":
        raise UsageError("graph replay needs an accelerator", expected="device cuda:N or npu:N", got=f"device {device}")


def choose_backend(manifest: Manifest, device: Device) -> str:
    """The backend that runs this artifact on this device when none is named."""
    for format in ORDER[device.kind]:
        if format in manifest.formats():
            return FORMATS[format]
    raise ArtifactError(
        "the artifact holds no program that this version can open",
        expected=" or ".join(FORMATS),
        got=", ".join(manifest.formats()),
        hint="upgrade npu-export, or name a backend",
    )


def _added() -> dict[str, Callable[[], Callable[[], Backend]]]:
    from importlib.metadata import entry_points

    return {point.name: point.load for point in entry_points(group=ENTRY_POINT_GROUP)}
