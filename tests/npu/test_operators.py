"""What runs on the CPU is found on the vendor's torch_npu, and what only lies there is not taken for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from npu_runtime.torch_interop import without_jit_deprecation

NPU = ("--device", "npu:0")
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_attention_is_not_reported_as_a_fallback_where_one_is_allowed(artifact: Path, command: Run) -> None:
    done = command("verify", artifact, *NPU, "--allow-fallback", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step["conditions"]["fallback"] for step in json.loads(done.stdout)["steps"]] == [[], [], []]


class Moved(torch.nn.Module):
    """Adds a literal that is made on the CPU in each call and then moved to where the images are."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = x.flatten(1)[:, : 17 * 64].reshape(-1, 17, 64) + torch.arange(64, device="cpu").view(1, 64).to(
            x.device
        )
        return tokens[:, 0], tokens


class Mixed(torch.nn.Module):
    """Adds what tracing on the CPU makes of `torch.arange`: a tensor that is there for ever."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = x.flatten(1)[:, : 17 * 64].reshape(-1, 17, 64) + torch.arange(64, device="cpu")
        return tokens[:, 0], tokens


@pytest.fixture
def artifact_with(artifact: Path, tmp_path: Path) -> Callable[[torch.nn.Module], Path]:
    """The tiny ViT's artifact with another program in place of its own."""

    def replace(module: torch.nn.Module) -> Path:
        copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
        with without_jit_deprecation():  # not frozen: freezing folds these literals into constants
            program = torch.jit.script(module.eval())
            for batch in (1, 2, 4):
                program.define(f"def b{batch}(self, x):\n    return self.forward(x)\n")
            torch.jit.save(program, str(copy / "model.ts"))
        return copy

    return replace


def test_a_literal_made_on_the_cpu_is_refused_by_the_operator_that_made_it_and_reported_where_allowed(
    command: Run, artifact_with: Callable[[torch.nn.Module], Path], rewrite: Callable[..., None]
) -> None:
    copy = artifact_with(Moved())
    rewrite(copy)
    done = command("verify", copy, *NPU, "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["what"], error["got"]) == ("the program makes tensors on the CPU while it runs", "aten::arange")
    allowed = command("verify", copy, *NPU, "--allow-fallback", "--json")
    assert allowed.returncode == 3, allowed.stdout + allowed.stderr  # another program than the reference
    assert json.loads(allowed.stdout)["steps"][0]["conditions"]["fallback"] == ["aten::arange"]


def test_a_program_that_mixes_devices_is_refused(
    command: Run, artifact_with: Callable[[torch.nn.Module], Path], rewrite: Callable[..., None]
) -> None:
    copy = artifact_with(Mixed())
    rewrite(copy)
    done = command("verify", copy, *NPU, "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["what"], error["where"]) == ("the program mixes devices", "aten::add")
    assert "baked" in error["next"]


def test_an_operator_that_fell_back_before_is_found_though_torch_npu_warns_once_and_to_stderr_alone(
    script: Run, artifact: Path
) -> None:
    done = script(
        """
import warnings, npu_runtime, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.nn.functional.gelu(torch.ones(3, device="npu:0"))
assert not [w for w in caught if "fall back" in str(w.message)], caught
try:
    npu_runtime.load(sys.argv[1], device="npu:0")
except npu_runtime.UnavailableError as error:
    assert error.got == "aten::gelu", error
else:
    raise SystemExit("loaded")
with npu_runtime.load(sys.argv[1], device="npu:0", allow_fallback=True, batches=[1]) as encoder:
    assert encoder.report().fallback == ("aten::gelu",)
""",
        artifact,
        EMULATED_CANN_FAULTS="no-kernel:aten::gelu",
    )
    assert done.stderr.count("CAUTION: The operator 'aten::gelu") == 1


def test_what_torch_npu_refuses_by_its_variable_is_named(script: Run, artifact: Path) -> None:
    script(
        """
import os
os.environ["TORCH_NPU_FALLBACK_CPU_DISABLE"] = "1"  # after the start of Python: read at the first such operator
import npu_runtime
try:
    npu_runtime.load(sys.argv[1], device="npu:0")
except npu_runtime.UnavailableError as error:
    assert error.got == "aten::gelu", error
    assert "would execute its main computation on CPU through dispatcher backend fallback" in str(error.__cause__), error.__cause__
else:
    raise SystemExit("loaded")
""",  # noqa: E501
        artifact,
        EMULATED_CANN_FAULTS="no-kernel:aten::gelu",
    )


@pytest.mark.parametrize(
    ("operator", "where"),
    [("aclnnGeluV2", "aten::gelu"), ("aclnnFlashAttentionScore", "npu::npu_fusion_attention_v3")],
)
def test_an_operator_that_cann_lacks_is_named(command: Run, artifact: Path, operator: str, where: str) -> None:
    done = command("verify", artifact, *NPU, "--json", EMULATED_CANN_FAULTS=f"missing:{operator}")
    assert done.returncode == 4, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["what"] == "this CANN lacks an operator of the program"
    assert (error["where"], error["expected"]) == (where, f"{operator} in libopapi.so")


def test_an_operator_that_fails_in_torch_npus_queue_is_named_with_what_cann_says(command: Run, artifact: Path) -> None:
    done = command("verify", artifact, *NPU, "--json", EMULATED_CANN_FAULTS="missing:aclnnAddmm")
    assert done.returncode == 4, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["what"] == "npu:0 stopped working"
    assert error["got"] == "the current working operator name is MatMul: the emulated CANN has no aclop MatMul"
