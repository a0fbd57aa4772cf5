"""Graphs on the vendor's torch_npu: used where their replays are right, left where they are not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NPU = ("--device", "npu:0")
Run = Callable[..., subprocess.CompletedProcess[str]]


def graphs(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["steps"][0]["conditions"]["graphs"]
    return found


@pytest.mark.parametrize("fault", ["replay:nothing", "replay:incomplete"])
def test_replays_that_give_other_outputs_leave_plain_calls_unless_graphs_are_required(
    command: Run, artifact: Path, fault: str
) -> None:
    report = graphs(command("verify", artifact, *NPU, "--json", EMULATED_CANN_FAULTS=fault))
    assert [(graph["replayed"], graph["speedup"]) for graph in report] == [(False, None)] * 3
    assert all(graph["reason"].startswith("replays give other outputs: ") for graph in report)
    assert all(" differs by " in graph["reason"] and ", limit " in graph["reason"] for graph in report)
    required = command("verify", artifact, *NPU, "--graph", "on", "--json", EMULATED_CANN_FAULTS=fault)
    assert required.returncode == 4, required.stdout + required.stderr
    error = json.loads(required.stdout)["error"]
    assert error["what"] == "replays of the captured graph give other outputs than plain calls on npu:0"
    assert error["where"] == "batch 1"
    assert " differs by " in error["got"]


@pytest.mark.parametrize(
    "fault", ["aclmdlRICaptureBegin=107027", "aclmdlRICaptureEnd=107028", "aclmdlRIExecuteAsync=107030"]
)
def test_a_capture_that_fails_leaves_the_device_as_it_was(script: Run, artifact: Path, fault: str) -> None:
    code = fault.partition("=")[2]
    script(
        f"""
import numpy as np, npu_runtime, torch
x = np.random.default_rng(0).standard_normal((7, 3, 32, 32)).astype(np.float32)
with npu_runtime.load(sys.argv[1], device="npu:0", graph=False) as plain:
    expected = plain(x)
before = torch.npu.memory_allocated(0)
with npu_runtime.load(sys.argv[1], device="npu:0") as encoder:
    reports = encoder.report().graphs
    assert [report.replayed for report in reports] == [False] * 3, reports
    assert all(report.reason.startswith("capture failed: ") for report in reports), reports
    assert all("{code}" in report.reason for report in reports), reports
    assert np.array_equal(encoder(x), expected)
    assert torch.npu.current_stream(0) == torch.npu.default_stream(0)
try:
    npu_runtime.load(sys.argv[1], device="npu:0", graph=True)
except npu_runtime.UnavailableError as error:
    assert "cannot be captured" in error.what and "{code}" in error.got, error
else:
    raise SystemExit("loaded")
assert torch.npu.memory_allocated(0) == before
assert torch.npu.conv.allow_hf32 is True
""",
        artifact,
        EMULATED_CANN_FAULTS=fault,
    )
