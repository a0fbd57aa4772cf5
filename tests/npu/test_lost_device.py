"""A device that stops working on the vendor's torch_npu: told with the vendor's code, and nothing done is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NPU = ("--device", "npu:0", "--graph", "off")
Run = Callable[..., subprocess.CompletedProcess[str]]

LOADING = """
import npu_runtime, torch
try:
    npu_runtime.load(sys.argv[1], device="npu:0")
except npu_runtime.UnavailableError as error:
    assert error.what == "npu:0 stopped working", error
    assert error.got.startswith("error code 507899"), error
    assert "npu-smi info" in error.hint, error
else:
    raise SystemExit("loaded")
assert torch.npu.conv.allow_hf32 is True
"""


def test_a_device_that_fails_while_an_encoder_is_loaded_is_no_bad_file(script: Run, artifact: Path) -> None:
    script(LOADING, artifact, EMULATED_CANN_FAULTS="aclrtMemcpy@3=507899")


@pytest.mark.parametrize("graph", [True, False], ids=["replayed", "called"])
def test_a_device_lost_in_a_call_is_told_with_the_vendors_code_and_the_encoder_still_closes(
    script: Run, artifact: Path, graph: bool
) -> None:
    script(
        f"""
import numpy as np, npu_runtime, torch
x = np.ones((1, 3, 32, 32), np.float32)
encoder = npu_runtime.load(sys.argv[1], device="npu:0", batches=[1], graph={graph})
told = None
for _ in range(400):
    try:
        encoder(x)
    except npu_runtime.UnavailableError as error:
        told = error
        break
assert told is not None
assert (told.what, told.where, told.exit_code) == ("npu:0 stopped working", "a call at batch 1", 4), told
assert told.got == "error code 507010: The task scheduler loses the heartbeat.", told
encoder.close()
assert torch.npu.conv.allow_hf32 is True
""",
        artifact,
        EMULATED_CANN_FAULTS="aclrtSynchronizeDevice@150=507010",
    )


BROKEN = """
import numpy as np, npu_runtime, torch
from npu_runtime.backends.device_program import DeviceProgram

def refused(call, what):
    try:
        call()
    except npu_runtime.UnavailableError as error:
        assert error.what == what, error
        assert "start the process again" in error.hint, error
    else:
        raise SystemExit(f"{call} gave what old memory held")

x = np.ones((1, 3, 32, 32), np.float32)
def fail(program):
    torch.erfinv(program._input).cpu()  # which no CANN of these tests has
"""


def test_after_an_error_in_torch_npus_queue_nothing_is_read_from_old_memory(script: Run, artifact: Path) -> None:
    script(
        f"""{BROKEN}
encoder = npu_runtime.load(sys.argv[1], device="npu:0", batches=[1], graph=False)
encoder(x)
plain = DeviceProgram._compute
DeviceProgram._compute = fail
refused(lambda: encoder(x), "npu:0 stopped working")
DeviceProgram._compute = plain
refused(lambda: encoder(2 * x), "npu:0 stopped working earlier in this process")
encoder.close()
refused(lambda: npu_runtime.load(sys.argv[1], device="npu:0"), "npu:0 stopped working earlier in this process")
npu_runtime.load(sys.argv[1], device="npu:1", batches=[1], graph=False)(x)
""",
        artifact,
    )


def test_a_capture_after_which_the_device_computes_no_more_does_not_leave_plain_calls(
    script: Run, artifact: Path
) -> None:
    script(
        f"""{BROKEN}
DeviceProgram._record = fail
refused(lambda: npu_runtime.load(sys.argv[1], device="npu:0", graph="auto"), "npu:0 stopped working")
""",
        artifact,
    )


def test_embedding_stops_where_the_device_is_lost_and_goes_on_from_there(
    command: Run, artifact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(60):
        Image.new("RGB", (32, 32), (index, 10, 60)).save(folder / f"{index:02}.png")
    output = tmp_path / "features.npy"
    lost = command(
        "embed", artifact, folder, *NPU, "--output", output,
        EMULATED_CANN_FAULTS="aclrtSynchronizeDevice@10=507010",
    )  # fmt: skip
    assert lost.returncode == 4, lost.stdout + lost.stderr
    assert "npu:0 stopped working" in lost.stderr
    assert "error code 507010" in lost.stderr
    assert not output.exists()
    resumed = command("embed", artifact, folder, *NPU, "--output", output, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    whole = tmp_path / "whole.npy"
    assert command("embed", artifact, folder, *NPU, "--output", whole).returncode == 0
    assert np.array_equal(np.load(output), np.load(whole))
