"""ONNX Runtime's sessions: which provider runs a graph, with which options, and what it would leave to the CPU."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npu_runtime.artifact.schema import Numerics
from npu_runtime.backends.base import Options, missing_package, unreadable_program
from npu_runtime.backends.onnx_bytes import with_outputs
from npu_runtime.devices import Device
from npu_runtime.devices.cores import threads_within_cores
from npu_runtime.devices.device import KINDS
from npu_runtime.errors import ArtifactError, UnavailableError

if TYPE_CHECKING:
    import onnxruntime

NO_FALLBACK = "session.disable_cpu_ep_fallback"
RECORD_NODES = "session.record_ep_graph_assignment_info"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
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


def require_provider(device: Device) -> None:
    """Raise UnavailableError when onnxruntime is not installed, or its build lacks the device's provider."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", "onnx", "onnxruntime") from error
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


@dataclass(frozen=True, slots=True)
class SessionOpener:
    """Opens graphs on one device under one choice of options."""

    device: Device
    options: Options

    def provider_options(self) -> Mapping[str, str]:
        return PROVIDER_OPTIONS[self.device.kind][self.options.numerics]

    def open(
        self, path: Path, added: Sequence[str] = ()
    ) -> tuple[onnxruntime.InferenceSession, tuple[str, ...] | None]:
        """A session of a graph, with the values `added` to its outputs, and the nodes that run on the CPU instead.

        There are such nodes only where that was allowed; None where this onnxruntime does not tell them. Raises
        UnavailableError naming them where it was not, and ArtifactError where onnxruntime does not open the graph.
        """
        if self.device.kind == "cpu":
            return self._session(path, added, fallback=True), ()
        if self.options.allow_fallback:
            session = self._session(path, added, fallback=True)
            return session, _nodes_on_cpu(session)
        try:
            session = self._session(path, added, fallback=False)
        except ArtifactError as error:
            raise self._explain(path, added, error) from error
        got = session.get_providers()
        if got[0] != self.device.traits.provider:
            raise UnavailableError(
                f"onnxruntime fell back from {self.device}",
                where=path,
                expected=self.device.traits.provider,
                got=", ".join(got),
                hint="npu-runtime doctor says what is missing",
            )
        return session, ()

    def _session(self, path: Path, added: Sequence[str], *, fallback: bool) -> onnxruntime.InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        # By itself it starts a thread for each physical core of the machine, and heeds neither affinity nor quota.
        threads = self.options.threads or threads_within_cores()
        if threads is not None:
            options.intra_op_num_threads = threads
        provider = self.device.traits.provider
        providers: list[object] = [provider]
        if self.device.kind != "cpu":
            options.add_session_config_entry(RECORD_NODES, "1")
            options.add_session_config_entry(NO_FALLBACK, "0" if fallback else "1")
            providers = [(provider, {"device_id": str(self.device.index), **self.provider_options()})]
            if fallback:
                providers.append(KINDS["cpu"].provider)

        def create(model: str | bytes) -> onnxruntime.InferenceSession:
            return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)

        try:
            if not added:
                return create(str(path))
            model = with_outputs(path.read_bytes(), added)
            options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent.absolute()))
            try:
                options.log_severity_level = 4  # what fails here is tried again
                return create(model)
            except Exception:  # before 1.20 the entry is ignored, and a graph in memory finds no weights
                options.log_severity_level = 3
                with tempfile.TemporaryDirectory() as folder:
                    for file in path.parent.iterdir():
                        (Path(folder) / file.name).symlink_to(file.absolute())
                    graph = Path(folder) / "with-outputs.onnx"
                    graph.write_bytes(model)
                    return create(str(graph))
        except Exception as error:  # onnxruntime's own classes share no public base but Exception
            raise unreadable_program(path, error, "onnxruntime") from error

    def _explain(self, path: Path, added: Sequence[str], error: ArtifactError) -> UnavailableError | ArtifactError:
        """The nodes that made a session without the CPU impossible; the error itself where there are none."""
        try:
            nodes = _nodes_on_cpu(self._session(path, added, fallback=True))
        except ArtifactError:
            return error
        if not nodes:  # none, or not told
            return error
        return UnavailableError(
            f"{self.device.traits.provider} does not run nodes of this graph, which would run on the CPU",
            where=path,
            expected=f"every node on {self.device}",
            got=", ".join(nodes),
            hint="run TorchScript on this device, or export with --opset 16; --allow-fallback runs it all the same",
        )


def _nodes_on_cpu(session: onnxruntime.InferenceSession) -> tuple[str, ...] | None:
    """`LayerNormalization (12)`: operators of the nodes that the CPU was given, with their number.

    None where this onnxruntime has no API that tells.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    counts = Counter(
        node.op_type
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == KINDS["cpu"].provider
        for node in subgraph.get_nodes()
    )
    return tuple(f"{name} ({count})" for name, count in counts.items())
