"""An entry point of a TorchScript program as the `forward` of a file of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from npu_runtime.artifact.schema import Program
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import missing_package
from npu_runtime.backends.torchscript import find_entry_point, open_file
from npu_runtime.devices.device import CPU
from npu_runtime.devices.torch_import import import_torch
from npu_runtime.errors import ProgramError
from npu_runtime.torch_interop import tensor_from_array, without_jit_deprecation, write_torchscript


def save_as_forward(artifact: Artifact, program: Program, target: Path) -> None:
    """Write a file whose `forward` is the program's entry point, and no other, with the weights that this one needs.

    It is opened again and must give the entry point's outputs, bit for bit, for the reference's images. Raises
    ArtifactError where the program is damaged, ProgramError where outputs differ.
    """
    try:
        import_torch()
    except ImportError as error:
        raise missing_package("torch", "torch", "torchscript") from error
    import torch

    path = artifact.checked_path(program.file)
    whole = open_file(path, CPU)
    entry_point = find_entry_point(whole, program, path)
    name = artifact.manifest.inputs[0].name
    holder = torch.nn.Module()
    holder.program = whole
    with without_jit_deprecation():
        scripted = torch.jit.script(holder.eval())
        scripted.define(f"def forward(self, {name}):\n    return self.program.{program.entry_point}({name})\n")
        frozen = torch.jit.freeze(scripted, optimize_numerics=False)  # which inlines, and changes no arithmetic
        write_torchscript(frozen, target, path.stat().st_size)
    saved = open_file(target, CPU)
    inputs, _ = artifact.read_reference()
    pixel_values = tensor_from_array(np.resize(inputs, artifact.manifest.inputs[0].of_batch(program.batch)))
    with torch.inference_mode():
        expected, got = entry_point(pixel_values), saved(pixel_values)
    if len(got) != len(expected) or not all(map(torch.equal, got, expected)):
        raise ProgramError(
            "what was saved as forward computes something else than the entry point",
            where=target,
            expected=f"{program.entry_point} of {path}, bit for bit",
            hint="report this with the versions of torch that npu-runtime inspect and pip show",
        )
