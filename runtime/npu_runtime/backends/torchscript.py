"""TorchScript programs through torch."""

from __future__ import annotations

from collections.abc import Sequence

from npu_runtime.artifact.schema import Program
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import Array, Options, missing_package, programs_of, unreadable_program
from npu_runtime.devices import Device
from npu_runtime.errors import ArtifactError
from npu_runtime.torch_interop import array_from_tensor, set_threads, tensor_from_array, without_jit_deprecation


class TorchScriptBackend:
    format = "torchscript"

    def open(self, artifact: Artifact, device: Device, options: Options) -> TorchScriptSession:
        try:
            set_threads(options.threads)
        except ImportError as error:
            raise missing_package("torch", "torch", "torchscript") from error
        return TorchScriptSession(artifact, programs_of(artifact, self.format, options), device)


class TorchScriptSession:
    """The entry points of a TorchScript file, one for each batch size, over one copy of the weights."""

    def __init__(self, artifact: Artifact, programs: Sequence[Program], device: Device) -> None:
        import torch

        self._path = artifact.path
        self._outputs = artifact.manifest.outputs
        self._names = [output.name for output in self._outputs]
        self._methods = {}
        modules = {}
        for program in programs:
            path = artifact.path / program.file
            if program.file not in modules:
                try:
                    with without_jit_deprecation():
                        modules[program.file] = torch.jit.load(str(path), map_location=str(device))
                except RuntimeError as error:
                    raise unreadable_program(path, error, "torch") from error
            method = getattr(modules[program.file], str(program.entry_point), None)
            if method is None:
                raise ArtifactError(
                    "the TorchScript file lacks an entry point that the manifest names",
                    where=path,
                    expected=program.entry_point,
                    hint="export the artifact again",
                )
            self._methods[program.batch] = method

    def run(self, pixel_values: Array, outputs: Sequence[str]) -> list[Array]:
        import torch

        with torch.inference_mode():
            results = self._methods[len(pixel_values)](tensor_from_array(pixel_values))
        self._check_results(results, len(pixel_values))
        return [array_from_tensor(results[self._names.index(name)]) for name in outputs]

    def close(self) -> None:
        self._methods.clear()

    def _check_results(self, results: object, batch: int) -> None:
        """The outputs are the manifest's, in its order; a TorchScript file does not say so itself."""
        expected = [f"{output.dtype} {list(output.of_batch(batch))}" for output in self._outputs]
        given = results if isinstance(results, tuple) else ()
        got = [f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.") for tensor in given]
        if got != expected:
            raise ArtifactError(
                "the TorchScript program gives other outputs than the manifest says",
                where=self._path,
                expected=f"a tuple of {', '.join(expected)}",
                got=", ".join(got) or type(results).__name__,
                hint="export the artifact again",
            )
