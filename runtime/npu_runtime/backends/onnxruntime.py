"""ONNX programs through ONNX Runtime and the execution provider of the device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from npu_runtime.artifact.schema import Manifest, Program, TensorSpec
from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.backends.base import Array, Options, SessionReport, programs_of
from npu_runtime.backends.inference_session import SessionOpener, require_provider
from npu_runtime.devices import Device
from npu_runtime.errors import ArtifactError

if TYPE_CHECKING:
    import onnxruntime


_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)"}
"""A tensor's dtype -> its type in onnxruntime's words."""


class OnnxRuntimeBackend:
    format = "onnx"
    replays_graphs = False

    def open(self, artifact: Artifact, device: Device, options: Options) -> OnnxRuntimeSession:
        """Raises UnavailableError as well when the device's execution provider is not in this build."""
        require_provider(device)
        session = OnnxRuntimeSession(artifact, programs_of(artifact, self.format, options), device, options)
        if device.kind != "cpu":
            session.open_all()
        return session


class OnnxRuntimeSession:
    """One `InferenceSession` for each batch size; on the CPU each is created when that size is first run.

    Each keeps weights of its own in memory, packed for its matrix products, so a size that is never
    used costs nothing. Files that were replaced since the encoder was loaded are refused.
    """

    def __init__(self, artifact: Artifact, programs: Sequence[Program], device: Device, options: Options) -> None:
        self._artifact = artifact
        self._programs = {program.batch: program for program in programs}
        self._device = device
        self._opener = SessionOpener(device, options)
        self._input = artifact.manifest.inputs[0].name
        self._open: dict[int, onnxruntime.InferenceSession] = {}
        self._fallback: tuple[str, ...] | None = ()
        self._lock = threading.Lock()

    def run(self, pixel_values: Images, outputs: Sequence[str]) -> list[Array]:
        batch = len(pixel_values)
        session = self._open.get(batch) or self._open_batch(batch)
        results: list[Array] = session.run(outputs, {self._input: pixel_values})
        return results

    def time_stages(self, pixel_values: Images, outputs: Sequence[str]) -> None:
        """None: a run of onnxruntime is one call, transfers inside."""
        return None

    def report(self) -> SessionReport:
        chosen = self._opener.provider_options()
        numerics = {f"{self._device.traits.provider}.{name}": value for name, value in chosen.items()}
        return SessionReport({"numerics": self._opener.options.numerics, **numerics}, fallback=self._fallback)

    def open_all(self) -> None:
        for batch in self._programs:
            self._open_batch(batch)

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _open_batch(self, batch: int) -> onnxruntime.InferenceSession:
        with self._lock:
            if batch not in self._open:
                program = self._programs[batch]
                self._artifact.check_files(program.needs)
                path = self._artifact.checked_path(program.file)
                session, on_cpu = self._opener.open(path)
                known = self._fallback
                self._fallback = None if known is None or on_cpu is None else tuple(dict.fromkeys((*known, *on_cpu)))
                _check_signature(session, self._artifact.manifest, program)
                self._open[batch] = session
            return self._open[batch]


def _check_signature(session: onnxruntime.InferenceSession, manifest: Manifest, program: Program) -> None:
    """The graph's inputs and outputs are the manifest's, name by name."""

    def expected(specs: Sequence[TensorSpec]) -> dict[str, tuple[str, list[int]]]:
        return {s.name: (_TYPES[s.dtype], list(s.of_batch(program.batch))) for s in specs}

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
