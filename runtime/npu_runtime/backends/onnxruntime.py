"""ONNX programs through ONNX Runtime on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from npu_runtime.artifact.schema import Manifest, Program, TensorSpec
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import Array, Options, missing_package, programs_of, unreadable_program
from npu_runtime.devices import Device
from npu_runtime.errors import ArtifactError, UnavailableError

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CPUExecutionProvider"


class OnnxRuntimeBackend:
    format = "onnx"

    def open(self, artifact: Artifact, device: Device, options: Options) -> OnnxRuntimeSession:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise missing_package("onnxruntime", "onnx", "onnxruntime") from error
        if device.kind != "cpu":
            raise UnavailableError(f"the backend onnxruntime does not run on {device}", expected="device cpu")
        return OnnxRuntimeSession(artifact, programs_of(artifact, self.format, options), options.threads)


class OnnxRuntimeSession:
    """One `InferenceSession` for each batch size, created when that size is first run.

    Each keeps weights of its own in memory, packed for its matrix products, so a size that is never
    used costs nothing. Files that were replaced since the encoder was loaded are refused.
    """

    def __init__(self, artifact: Artifact, programs: Sequence[Program], threads: int | None) -> None:
        self._artifact = artifact
        self._programs = {program.batch: program for program in programs}
        self._threads = threads
        self._input = artifact.manifest.inputs[0].name
        self._open: dict[int, onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()

    def run(self, pixel_values: Array, outputs: Sequence[str]) -> list[Array]:
        batch = len(pixel_values)
        session = self._open.get(batch) or self._open_batch(batch)
        results: list[Array] = session.run(outputs, {self._input: pixel_values})
        return results

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _open_batch(self, batch: int) -> onnxruntime.InferenceSession:
        with self._lock:
            if batch not in self._open:
                session = self._create(self._programs[batch])
                _check_signature(session, self._artifact.manifest, self._programs[batch])
                self._open[batch] = session
            return self._open[batch]

    def _create(self, program: Program) -> onnxruntime.InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        self._artifact.check_files(program.needs)
        path = self._artifact.checked_path(program.file)
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])
        except Exception as error:  # onnxruntime's own classes share no public base but Exception
            raise unreadable_program(path, error, "onnxruntime") from error


def _check_signature(session: onnxruntime.InferenceSession, manifest: Manifest, program: Program) -> None:
    """The graph's inputs and outputs are the manifest's, name by name."""

    def expected(specs: Sequence[TensorSpec]) -> dict[str, tuple[str, list[int]]]:
        return {s.name: ("tensor(float)", list(s.of_batch(program.batch))) for s in specs}

    got_inputs = {node.name: (node.type, node.shape) for node in session.get_inputs()}
    got_outputs = {node.name: (node.type, node.shape) for node in session.get_outputs()}
    for specs, got in ((manifest.inputs, got_inputs), (manifest.outputs, got_outputs)):
        if got != expected(specs):
            raise ArtifactError(
                "the ONNX graph has other inputs or outputs than the manifest says",
                where=program.file,
                expected=expected(specs),
                got=got,
                hint="export the artifact again",
            )
