"""TorchScript programs through torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_runtime.artifact.schema import Program
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import Options, missing_package, programs_of, unreadable_program
from npu_runtime.backends.torch_session import TorchSession, open_torch_session
from npu_runtime.devices import Device
from npu_runtime.devices.torch_import import import_torch
from npu_runtime.errors import ArtifactError
from npu_runtime.torch_interop import without_jit_deprecation

if TYPE_CHECKING:
    import torch


class TorchScriptBackend:
    format = "torchscript"
    replays_graphs = True

    def open(self, artifact: Artifact, device: Device, options: Options) -> TorchSession:
        try:
            import_torch()
        except ImportError as error:
            raise missing_package("torch", "torch", "torchscript") from error
        checked = programs_of(artifact, self.format, options)

        return open_torch_session(
            artifact, device, options, lambda device, _: open_entry_points(artifact.path, checked, device)
        )


def open_entry_points(folder: Path, programs: Sequence[Program], device: Device) -> Mapping[int, Any]:
    """torch's methods by batch size, on a device, over one copy of the weights of each file.

    Raises ArtifactError where torch does not open a file, or the file lacks an entry point.
    """
    modules: dict[str, torch.jit.ScriptModule] = {}
    methods: dict[int, Any] = {}
    for program in programs:
        path = folder / program.file
        if program.file not in modules:
            modules[program.file] = open_file(path, device)
        methods[program.batch] = find_entry_point(modules[program.file], program, path)
    return methods


def open_file(path: Path, device: Device) -> torch.jit.ScriptModule:
    """What a TorchScript file holds, on a device. Raises ArtifactError where torch does not open it."""
    import torch

    from npu_runtime.devices.failures import is_failure

    try:
        with without_jit_deprecation():
            module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=str(device))
    except RuntimeError as error:
        if is_failure(error):  # of the device, on which the weights are put
            raise
        raise unreadable_program(path, error, "torch") from error
    return module


def find_entry_point(module: torch.jit.ScriptModule, program: Program, path: Path) -> Any:
    """The method of a program. Raises ArtifactError where the file lacks it."""
    method = getattr(module, str(program.entry_point), None)
    if method is None:
        raise ArtifactError(
            "the TorchScript file lacks an entry point that the manifest names",
            where=path,
            expected=program.entry_point,
            hint="export the artifact again",
        )
    return method
