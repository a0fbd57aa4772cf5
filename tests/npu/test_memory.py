"""Too little memory on the vendor's torch_npu: told with what was asked and is free, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from npu_export.pipeline import export

NPU = ("--device", "npu:0")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def large_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ViT, batch 1 and 256, of which the second takes some 5 MB. Not to be changed."""
    output = tmp_path_factory.mktemp("large") / "tiny-vit"
    return export("tiny-vit", weights="random:3", formats=("torchscript",), batch=(1, 256), output=output)


def test_weights_that_do_not_fit_are_no_bad_file(command: Run, artifact: Path) -> None:
    done = command("verify", artifact, *NPU, "--json", EMULATED_CANN_MEMORY_MB="1")
    assert done.returncode == 4, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["what"], error["where"]) == ("npu:0 has too little free memory", "the weights")
    assert error["expected"] == "2.00 MiB more"
    assert error["got"].startswith("1.0 MiB free of 1.0 MiB")
    assert error["next"].startswith("the weights alone do not fit")


def test_a_batch_that_does_not_fit_names_the_smaller_ones_which_do(script: Run, large_batch: Path) -> None:
    script(
        """
import gc, numpy as np, npu_runtime, torch
x = np.ones((3, 3, 32, 32), np.float32)
try:
    npu_runtime.load(sys.argv[1], device="npu:0")
except npu_runtime.UnavailableError as error:
    assert (error.what, error.where, error.exit_code) == ("npu:0 has too little free memory", "batch 256", 4), error
    assert error.expected.endswith(" MiB more"), error
    assert " free of 6.0 MiB" in error.got, error
    assert "leave out batch size 256 and larger" in error.hint and "load(batches=[1])" in error.hint, error
    assert "graph=False" in error.hint, error
else:
    raise SystemExit("loaded")
gc.collect()
assert torch.npu.memory_allocated(0) == 0
assert torch.npu.conv.allow_hf32 is True
with npu_runtime.load(sys.argv[1], device="npu:0", batches=[1], graph=False) as encoder:
    assert encoder(x).shape == (3, 64)
""",
        large_batch,
        EMULATED_CANN_MEMORY_MB="6",
    )


def test_a_capture_without_memory_leaves_plain_calls_and_says_what_was_asked(command: Run, artifact: Path) -> None:
    done = command("verify", artifact, *NPU, "--json", EMULATED_CANN_MEMORY_MB="2")
    assert done.returncode == 0, done.stdout + done.stderr
    for step in json.loads(done.stdout)["steps"]:
        for graph in step["conditions"]["graphs"]:
            assert graph["replayed"] is False
            assert graph["reason"].startswith("capture failed: NPU out of memory. Tried to allocate 2.00 MiB")
    required = command("verify", artifact, *NPU, "--graph", "on", "--json", EMULATED_CANN_MEMORY_MB="2")
    assert required.returncode == 4
    error = json.loads(required.stdout)["error"]
    assert (error["what"], error["where"]) == ("npu:0 has too little free memory", "batch 1")
    assert "--graph off" in error["next"]


def test_memory_that_something_else_took_fails_the_call_and_not_the_encoder(script: Run, large_batch: Path) -> None:
    script(
        """
import numpy as np, npu_runtime, torch
x = np.ones((256, 3, 32, 32), np.float32)
with npu_runtime.load(sys.argv[1], device="npu:0", graph=False) as encoder:
    expected = encoder(x)
    torch.npu.empty_cache()
    taken = []
    try:
        while True:
            taken.append(torch.empty(2**19, device="npu:0"))
    except torch.OutOfMemoryError:
        pass
    try:
        encoder(x)
    except npu_runtime.UnavailableError as error:
        assert (error.what, error.where) == ("npu:0 has too little free memory", "a call at batch 256"), error
        assert "took memory since" in error.hint, error
    else:
        raise SystemExit("it ran")
    taken.clear()
    assert np.array_equal(encoder(x), expected)
""",
        large_batch,
        EMULATED_CANN_MEMORY_MB="40",
    )


def test_host_memory_that_cannot_be_pinned_is_done_without(script: Run, artifact: Path) -> None:
    """torch_npu gives a tensor without memory there, and copying to it ends the process."""
    script(
        """
import numpy as np, npu_runtime
with npu_runtime.load(sys.argv[1], device="npu:0") as encoder:
    assert np.isfinite(encoder(np.ones((3, 3, 32, 32), np.float32))).all()
""",
        artifact,
        EMULATED_CANN_FAULTS="aclrtMallocHost=207001",
    )
