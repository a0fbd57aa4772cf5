"""The entry points of a TorchScript program, each as the `forward` of a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from npu_runtime.artifact.schema import Program
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import missing_package
from npu_runtime.backends.torchscript import find_entry_point, open_file
from npu_runtime.devices.ambient import without_autocast
from npu_runtime.devices.device import CPU
from npu_runtime.devices.torch_import import import_torch
from npu_runtime.errors import ProgramError
from npu_runtime.torch_interop import tensor_from_array, without_jit_deprecation, write_torchscript

if TYPE_CHECKING:
    import torch


class ForwardSaver:
    """Saves entry points of an artifact. A program's file is opened once: torch never lets go of what was frozen."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._opened: dict[str, torch.jit.ScriptModule] = {}

    def save(self, program: Program, target: Path) -> None:
        """Write a file whose `forward` is the program's entry point, and no other, with the weights that it needs.

        It is opened again and must give the entry point's outputs, bit for bit, for the reference's images. Raises
        ArtifactError where the program is damaged, UnavailableError where torch is not installed, ProgramError where
        outputs differ.
        """
        try:
            import_torch()
        except ImportError as error:
            raise missing_package("torch", "torch", "torchscript") from error
        import torch

        path = self._artifact.checked_path(program.file)
        if program.file not in self._opened:
            self._opened[program.file] = open_file(path, CPU)
        whole = self._opened[program.file]
        entry_point = find_entry_point(whole, program, path)
        name, method = self._artifact.manifest.inputs[0].name, program.entry_point
        holder = torch.nn.Module()
        # By a name of its own: alike modules share a class, and its forward.
        holder.add_module(f"holds_{method}", whole)
        with without_jit_deprecation(), without_autocast("cpu"):
            scripted = torch.jit.script(holder.eval())
            scripted.define(f"def forward(self, {name}):\n    return self.holds_{method}.{method}({name})\n")
            frozen = torch.jit.freeze(scripted, optimize_numerics=False)  # which inlines, and changes no arithmetic
            write_torchscript(frozen, target, path.stat().st_size)
        saved = open_file(target, CPU)
        inputs, _ = self._artifact.read_reference()
        pixel_values = tensor_from_array(np.resize(inputs, self._artifact.manifest.inputs[0].of_batch(program.batch)))
        plain = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]  # a plan for one run costs more
        with torch.inference_mode(), without_autocast("cpu"), plain:
            expected, got = entry_point(pixel_values), saved(pixel_values)
        if len(got) != len(expected) or not all(map(torch.equal, got, expected)):
            raise ProgramError(
                "what was saved as forward computes something else than the entry point",
                where=target,
                expected=f"{method} of {path}, bit for bit",
                hint="report this with the versions of torch that npu-runtime inspect and pip show",
            )
