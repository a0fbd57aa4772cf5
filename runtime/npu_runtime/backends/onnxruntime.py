"""ONNX programs through ONNX Runtime and the execution provider of the device."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npu_runtime.artifact.schema import Manifest, Program, TensorSpec
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import (
    Array,
    Options,
    SessionReport,
    missing_package,
    programs_of,
    unreadable_program,
)
from npu_runtime.devices import Device
from npu_runtime.devices.device import KINDS
from npu_runtime.devices.numerics import Numerics
from npu_runtime.errors import ArtifactError, UnavailableError, UsageError

if TYPE_CHECKING:
    import onnxruntime

NO_FALLBACK = "session.disable_cpu_ep_fallback"
RECORD_NODES = "session.record_ep_graph_assignment_info"
"""Entries of a session's configuration: onnxruntime_session_options_config_keys.h."""

PROVIDER_OPTIONS: dict[str, dict[Numerics, dict[str, str]]] = {
    "cpu": {"strict": {}, "fast": {}},
    "cuda": {"strict": {"use_tf32": "0"}, "fast": {"use_tf32": "1"}},
    # The CANN provider computes in float16 unless it is told otherwise.
    "npu": {
        "strict": {"precision_mode": "must_keep_origin_dtype", "op_select_impl_mode": "high_precision"},
        "fast": {"precision_mode": "allow_fp32_to_fp16", "op_select_impl_mode": "high_performance"},
    },
}
"""Kind of device -> options of its execution provider for each choice of numerics."""


class OnnxRuntimeBackend:
    format = "onnx"

    def open(self, artifact: Artifact, device: Device, options: Options) -> OnnxRuntimeSession:
        """Raises UnavailableError as well when the device's execution provider is not in this build."""
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_package("onnxruntime", "onnx", "onnxruntime") from error
        if options.graph is True:
            raise UsageError(
                "the backend onnxruntime replays no graphs",
                expected="graph replay with torchscript or eager",
                got=f"graph replay with onnxruntime on {device}",
            )
        provider = device.traits.provider
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise UnavailableError(
                f"the installed onnxruntime has no execution provider for {device}",
                expected=provider,
                got=", ".join(available),
                hint={
                    "cuda": "pip install onnxruntime-gpu in place of onnxruntime",
                    "npu": "pip install onnxruntime-cann in place of onnxruntime; it needs numpy 1 and opset 16",
                }.get(device.kind),
            )
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
        self._options = options
        self._input = artifact.manifest.inputs[0].name
        self._open: dict[int, onnxruntime.InferenceSession] = {}
        self._fallback: dict[str, None] = {}
        self._lock = threading.Lock()

    def run(self, pixel_values: Array, outputs: Sequence[str]) -> list[Array]:
        batch = len(pixel_values)
        session = self._open.get(batch) or self._open_batch(batch)
        results: list[Array] = session.run(outputs, {self._input: pixel_values})
        return results

    def report(self) -> SessionReport:
        chosen = self._provider_options()
        numerics = {f"{self._device.traits.provider}.{name}": value for name, value in chosen.items()}
        return SessionReport({"numerics": self._options.numerics, **numerics}, fallback=tuple(self._fallback))

    def open_all(self) -> None:
        for batch in self._programs:
            self._open_batch(batch)

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _provider_options(self) -> dict[str, str]:
        return PROVIDER_OPTIONS[self._device.kind][self._options.numerics]

    def _open_batch(self, batch: int) -> onnxruntime.InferenceSession:
        with self._lock:
            if batch not in self._open:
                program = self._programs[batch]
                self._artifact.check_files(program.needs)
                path = self._artifact.checked_path(program.file)
                session = self._create(path)
                _check_signature(session, self._artifact.manifest, program)
                self._open[batch] = session
            return self._open[batch]

    def _create(self, path: Path) -> onnxruntime.InferenceSession:
        if self._device.kind == "cpu":
            return self._session(path, fallback=True)
        if self._options.allow_fallback:
            session = self._session(path, fallback=True)
            self._fallback.update(dict.fromkeys(_nodes_on_cpu(session)))
            return session
        try:
            session = self._session(path, fallback=False)
        except ArtifactError as error:
            raise self._explain(path, error) from error
        got = session.get_providers()
        if got[0] != self._device.traits.provider:
            raise UnavailableError(
                f"onnxruntime fell back from {self._device}",
                where=path,
                expected=self._device.traits.provider,
                got=", ".join(got),
                hint="npu-runtime doctor says what is missing",
            )
        return session

    def _session(self, path: Path, *, fallback: bool) -> onnxruntime.InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        if self._options.threads is not None:
            options.intra_op_num_threads = self._options.threads
        provider = self._device.traits.provider
        providers: list[object] = [provider]
        if self._device.kind != "cpu":
            options.add_session_config_entry(RECORD_NODES, "1")
            options.add_session_config_entry(NO_FALLBACK, "0" if fallback else "1")
            providers = [(provider, {"device_id": str(self._device.index), **self._provider_options()})]
            if fallback:
                providers.append(KINDS["cpu"].provider)
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        except Exception as error:  # onnxruntime's own classes share no public base but Exception
            raise unreadable_program(path, error, "onnxruntime") from error

    def _explain(self, path: Path, error: ArtifactError) -> UnavailableError | ArtifactError:
        """The nodes that made a session without the CPU impossible; the error itself where there are none."""
        try:
            nodes = _nodes_on_cpu(self._session(path, fallback=True))
        except ArtifactError:
            return error
        if not nodes:
            return error
        return UnavailableError(
            f"{self._device.traits.provider} does not run nodes of this graph, which would run on the CPU",
            where=path,
            expected=f"every node on {self._device}",
            got=", ".join(nodes),
            hint="run TorchScript on this device, or export with --opset 16; --allow-fallback runs it all the same",
        )


def _nodes_on_cpu(session: onnxruntime.InferenceSession) -> list[str]:
    """`LayerNormalization (12)`: operators of the nodes that the CPU was given, with their number."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    counts = Counter(
        node.op_type
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == KINDS["cpu"].provider
        for node in subgraph.get_nodes()
    )
    return [f"{name} ({count})" for name, count in counts.items()]


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
