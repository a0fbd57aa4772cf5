"""Every option of where and how programs run is honoured or refused, before anything expensive runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_runtime import load
from npu_runtime.backends import table
from npu_runtime.devices import Device
from npu_runtime.parity.ladder import options_on

COMMANDS: dict[str, tuple[str | Path, ...]] = {
    "verify": (),
    "parity": ("--seeds", "1"),
    "bench": ("--iterations", "2", "--warmup", "1"),
    "embed": (Path(__file__).parents[1] / "data" / "photographs" / "coffee.jpg",),
}
commands = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture
def run(call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run a subcommand on the tiny artifact; what embed writes goes to a folder of the test."""

    def run(command: str, *arguments: str | Path) -> Any:
        output = ("--output", tmp_path / "features.npy") if command == "embed" else ()
        return call("npu-runtime", command, tiny_artifact, *COMMANDS[command], *output, *arguments)

    return run


@commands
def test_graphs_on_the_cpu_are_refused_before_anything_runs(run: Callable[..., Any], command: str) -> None:
    result = run(command, "--graph", "on")
    assert (result.code, "graph replay needs an accelerator" in result.err, "✓" in result.err) == (2, True, False)


@commands
@pytest.mark.parametrize("name", ["onnxruntime", "onnx"])
def test_graphs_of_a_named_backend_that_has_none_are_refused_before_anything_runs(
    run: Callable[..., Any], command: str, name: str
) -> None:
    result = run(command, "--graph", "on", "--device", "cuda:0", "--backend", name, "--json")
    assert result.code == 2
    assert result.json["error"]["what"] == "the backend onnxruntime replays no graphs"
    assert (result.json["error"]["got"], "✓" in result.err) == ("graph replay with onnxruntime on cuda:0", False)


def test_without_a_name_bench_lists_the_backend_without_graphs_and_does_not_open_it(run: Callable[..., Any]) -> None:
    result = run("bench", "--graph", "on", "--device", "cuda:0", "--cold", "--json")
    assert result.code == 4, "there is no GPU"
    assert "onnxruntime: the backend onnxruntime replays no graphs" in result.json["error"]["got"]
    assert "open torchscript" in result.err
    assert "open onnxruntime" not in result.err


def test_without_a_name_parity_lists_the_backend_without_graphs_on_the_device_alone(run: Callable[..., Any]) -> None:
    record = run("parity", "--graph", "on", "--device", "cuda:0", "--json").json
    steps = {(step["backend"], step["device"]): (step["status"], step["reason"]) for step in record["steps"]}
    assert steps["onnxruntime", "cpu"] == ("passed", None)
    assert steps["onnxruntime", "cuda:0"] == ("not run", "the backend onnxruntime replays no graphs")


def test_without_a_name_verify_lists_the_backend_without_graphs(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = run("verify", "--graph", "on", "--device", "cuda:0")
    assert (absent.code, "run onnxruntime" in absent.err) == (4, False), "nothing ran"
    monkeypatch.setattr("npu_runtime.cli.verify.measure_parity", lambda *_, **__: iter(()))
    result = run("verify", "--graph", "on", "--device", "cuda:0", "--json")
    (step,) = result.json["steps"]
    assert (step["backend"], step["status"]) == ("onnxruntime", "not run")
    assert step["reason"] == "the backend onnxruntime replays no graphs"


def test_an_artifact_of_programs_without_graphs_alone_is_refused(
    run: Callable[..., Any], call: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None]
) -> None:
    def only_onnx(manifest: dict[str, Any]) -> None:
        manifest["programs"] = [p for p in manifest["programs"] if p["format"] == "onnx"]
        manifest["files"] = [f for f in manifest["files"] if f["file"] != "model.ts"]

    rewrite(artifact_copy, only_onnx)
    (artifact_copy / "model.ts").unlink()
    result = call("npu-runtime", "verify", artifact_copy, "--graph", "on", "--device", "cuda:0")
    assert (result.code, "replays no graphs" in result.err, "✓" in result.err) == (2, True, False)


def test_a_backend_that_does_not_say_whether_it_replays_graphs_is_asked_when_it_opens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Silent:
        format = "onnx"

    monkeypatch.setattr(table, "_added", lambda: {"silent": lambda: Silent})
    table.require_replay("silent", Device("cuda", 0))


@commands
def test_fast_numerics_on_the_cpu_are_passed_on_and_recorded(run: Callable[..., Any], command: str) -> None:
    record = run(command, "--numerics", "fast", "--json").json
    reports = {
        "embed": lambda: [record["conditions"]],
        "bench": lambda: record["conditions"].values(),
    }.get(command, lambda: [step["conditions"] for step in record["steps"]])()
    assert [report["numerics"]["numerics"] for report in reports] == ["fast"] * len(reports)


def test_localise_passes_on_fast_numerics_on_the_cpu(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[dict[str, Any]] = []
    monkeypatch.setattr("npu_runtime.cli.parity.localise", lambda *_, **how: chosen.append(how) or _nothing_found())
    monkeypatch.setattr("npu_runtime.cli.parity.require_probes", lambda _: None)
    from npu_export.pipeline import export

    artifact = export("tiny-vit", weights="random:3", formats=("onnx",), output=tmp_path / "a")
    line = ("--localise", "--numerics", "fast", "--seeds", "1", "--json")
    assert call("npu-runtime", "parity", artifact, *line).code == 0
    assert [(how["device"], how["numerics"]) for how in chosen] == [("cpu", "fast")]


def _nothing_found() -> Any:
    from npu_runtime.parity.records import Localisation

    return Localisation("onnxruntime", "cpu", "onnx", 1, (), None, (), ())


def test_a_step_on_the_cpu_before_a_device_takes_the_threads_alone() -> None:
    how: Any = {"device": "npu", "threads": 3, "numerics": "fast", "graph": True, "allow_fallback": True}
    assert options_on("cpu", how) == {"device": "cpu", "threads": 3}
    assert options_on("npu:0", how) == {**how, "device": "npu:0"}
    assert options_on("cpu", {**how, "device": "cpu"}) == {**how, "device": "cpu"}


@pytest.mark.parametrize("command", ["parity", "bench"])
def test_a_checkpoint_for_an_eager_that_is_not_installed_is_refused(
    run: Callable[..., Any], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_added", dict)
    result = run(command, "--weights", "x")
    assert (result.code, "✓" in result.err) == (4, False)
    assert "--weights is for eager, which is not installed" in result.err


def test_a_batch_size_that_was_not_frozen_is_refused_before_anything_runs(run: Callable[..., Any]) -> None:
    result = run("parity", "--batch", "3")
    assert (result.code, "not frozen for this batch size" in result.err, "✓" in result.err) == (2, True, False)


def test_load_refuses_graphs_of_a_backend_that_has_none(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_runtime.devices.require_device", lambda text: Device("npu", 0))
    with pytest.raises(Exception, match="the backend onnxruntime replays no graphs"):
        load(tiny_artifact, backend="onnx", device="npu:0", graph=True)
