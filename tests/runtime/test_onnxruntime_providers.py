"""ONNX Runtime on another device than the CPU, through a stand-in for the builds that have its execution provider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from npu_runtime import ArtifactError, UnavailableError, UsageError, load
from npu_runtime.backends import inference_session as backend
from npu_runtime.cli.console import print_conditions
from npu_runtime.devices import Device

CPU = "CPUExecutionProvider"
CANN = "CANNExecutionProvider"
Asked = list[tuple[Any, dict[str, str]]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    """An onnxruntime build with the CANN provider, of which the CPU does the arithmetic, and what it was asked for."""
    real = onnxruntime.InferenceSession

    def install(on_cpu: Sequence[str] = (), falls_back: bool = False, tells: bool = True) -> Asked:
        asked: Asked = []

        class Session:
            def __init__(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> None:
                entries = {
                    key: options.get_session_config_entry(key) for key in (backend.NO_FALLBACK, backend.RECORD_NODES)
                }
                asked.append((providers, entries))
                assert enable_fallback == 0
                refuses = entries[backend.NO_FALLBACK] == "1"
                if on_cpu and refuses:
                    raise RuntimeError("This session contains graph nodes that are assigned to the default CPU EP")
                self._session = real(path, providers=[CPU])
                self._providers = [CPU] if falls_back else [CANN, CPU]

            def get_providers(self) -> list[str]:
                return self._providers

            def get_provider_graph_assignment_info(self) -> list[Any]:
                def nodes(names: Sequence[str]) -> Callable[[], list[Any]]:
                    return lambda: [SimpleNamespace(op_type=name) for name in names]

                return [
                    SimpleNamespace(ep_name=CANN, get_nodes=nodes(["MatMul"])),
                    SimpleNamespace(ep_name=CPU, get_nodes=nodes(on_cpu)),
                ]

            def __getattr__(self, name: str) -> Any:
                if name == "get_provider_graph_assignment_info":  # of the session behind, where this class lacks it
                    raise AttributeError(name)
                return getattr(self._session, name)

        if not tells:
            del Session.get_provider_graph_assignment_info
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CANN, CPU])
        return asked

    monkeypatch.setattr("npu_runtime.devices.require_device", lambda text: Device("npu", 0))
    return install


def test_a_build_without_the_devices_provider_is_refused(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, package in (("npu", "onnxruntime-cann"), ("cuda", "onnxruntime-gpu")):
        monkeypatch.setattr("npu_runtime.devices.require_device", lambda text, kind=kind: Device(kind, 0))
        with pytest.raises(UnavailableError, match=f"no execution provider for {kind}:0") as caught:
            load(tiny_artifact, backend="onnx", device=f"{kind}:0")
        assert package in str(caught.value.hint)


@pytest.mark.parametrize(("numerics", "mode"), [("strict", "must_keep_origin_dtype"), ("fast", "allow_fp32_to_fp16")])
def test_every_batch_size_is_opened_at_once_on_the_provider_alone(
    tiny_artifact: Path, build: Callable[..., Asked], numerics: Any, mode: str
) -> None:
    asked = build()
    with load(tiny_artifact, backend="onnx", device="npu:0", numerics=numerics) as encoder:
        assert len(asked) == len(encoder.batches) == 2
        for providers, entries in asked:
            ((name, options),) = providers
            assert (name, options["device_id"], options["precision_mode"]) == (CANN, "0", mode)
            assert entries == {backend.NO_FALLBACK: "1", backend.RECORD_NODES: "1"}
        report = encoder.report()
        assert report.fallback == ()
        assert report.numerics["numerics"] == numerics
        assert report.numerics[f"{CANN}.precision_mode"] == mode
        assert encoder(np.zeros((5, 3, 32, 32), np.float32)).shape == (5, 64)


def test_a_provider_that_fell_back_is_refused(tiny_artifact: Path, build: Callable[..., Asked]) -> None:
    build(falls_back=True)
    with pytest.raises(UnavailableError, match="onnxruntime fell back from npu:0") as caught:
        load(tiny_artifact, backend="onnx", device="npu:0")
    assert (caught.value.expected, caught.value.got) == (CANN, CPU)


def test_nodes_that_would_run_on_the_cpu_are_named(tiny_artifact: Path, build: Callable[..., Asked]) -> None:
    build(on_cpu=["LayerNormalization"] * 3 + ["Gelu"])
    with pytest.raises(UnavailableError, match=f"{CANN} does not run nodes of this graph") as caught:
        load(tiny_artifact, backend="onnx", device="npu:0")
    assert caught.value.got == "LayerNormalization (3), Gelu (1)"
    assert "--opset 16" in str(caught.value.hint)


def test_nodes_on_the_cpu_that_were_allowed_are_reported(tiny_artifact: Path, build: Callable[..., Asked]) -> None:
    build(on_cpu=["LayerNormalization"] * 3)
    with load(tiny_artifact, backend="onnx", device="npu:0", allow_fallback=True) as encoder:
        assert encoder.report().fallback == ("LayerNormalization (3)",)


def test_without_the_api_that_tells_where_nodes_run_the_fallback_is_unknown(
    tiny_artifact: Path, build: Callable[..., Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    build(on_cpu=["LayerNormalization"], tells=False)
    with load(tiny_artifact, backend="onnx", device="npu:0", allow_fallback=True) as encoder:
        report = encoder.report()
    assert report.fallback is None
    print_conditions({"onnxruntime": report})
    assert "fallback  onnxruntime: allowed, and unknown" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="does not open this program"):
        load(tiny_artifact, backend="onnx", device="npu:0")


def test_without_that_api_there_is_no_fallback_where_it_was_not_allowed(
    tiny_artifact: Path, build: Callable[..., Asked]
) -> None:
    build(tells=False)
    with load(tiny_artifact, backend="onnx", device="npu:0") as encoder:
        assert encoder.report().fallback == ()


def test_the_cpu_is_asked_for_nothing_of_this(tiny_artifact: Path) -> None:
    with load(tiny_artifact, backend="onnx") as encoder:
        assert (encoder.report().numerics, encoder.report().fallback) == ({"numerics": "strict"}, ())


@pytest.mark.parametrize("backend", ["onnx", "torchscript", "eager"])
def test_graph_replay_where_there_is_none_is_refused(tiny_artifact: Path, backend: str) -> None:
    with pytest.raises(UsageError, match="graph"):
        load(tiny_artifact, backend=backend, graph=True)
