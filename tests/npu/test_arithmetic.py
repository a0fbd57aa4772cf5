"""Operators that are wrong or inexact on the vendor's torch_npu are refused by name before an encoder is used."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_export.pipeline import export

NPU = ("--device", "npu:0", "--graph", "off")
Run = Callable[..., subprocess.CompletedProcess[str]]

HAS = {
    "tiny-vit": {"matmul", "conv", "attention", "layer_norm", "gelu"},
    "tiny-pe-lang": {"matmul", "conv", "attention", "layer_norm", "gelu"},
    "tiny-convnext": {"matmul", "conv", "layer_norm", "gelu"},
    "tiny-dinov2": {"matmul", "conv", "attention", "layer_norm", "gelu"},
    "tiny-aimv2": {"matmul", "conv", "attention", "rms_norm"},
}


def test_every_operator_of_a_family_is_measured_and_no_other(command: Run, family_artifact: Path) -> None:
    done = command("verify", family_artifact, *NPU, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    arithmetic = json.loads(done.stdout)["steps"][0]["conditions"]["arithmetic"]
    assert arithmetic.pop("dtypes") == {}
    measured = {kind: error for kind, error in arithmetic.items() if error is not None}
    assert set(measured) == HAS[family_artifact.name]
    assert all(0 < error < 2e-6 for error in measured.values()), measured


def refusal(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 1, done.stdout + done.stderr
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    return error


@pytest.mark.parametrize("numerics", ["strict", "fast"])
def test_attention_that_averages_uniformly_is_refused_under_any_numerics(
    command: Run, artifact: Path, numerics: str
) -> None:
    arguments = ("verify", artifact, *NPU, "--numerics", numerics, "--json")
    error = refusal(command(*arguments, EMULATED_CANN_FAULTS="attention:uniform"))
    assert error["what"] == "attention gives wrong results on npu:0"
    assert error["where"] == "npu::npu_fusion_attention_v3"


def test_a_gelu_by_tanh_is_refused_and_fast_numerics_report_it(command: Run, artifact: Path) -> None:
    error = refusal(command("verify", artifact, *NPU, "--json", EMULATED_CANN_FAULTS="gelu:tanh"))
    assert (error["what"].partition(",")[0], error["where"]) == ("gelu is not exact float32 on npu:0", "aten::gelu")
    fast = command("verify", artifact, *NPU, "--numerics", "fast", "--json", EMULATED_CANN_FAULTS="gelu:tanh")
    arithmetic = json.loads(fast.stdout)["steps"][0]["conditions"]["arithmetic"]
    assert 4e-4 < arithmetic["gelu"] < 5e-4
    assert arithmetic["attention"] < 1e-6


def test_products_in_hf32_are_refused_whatever_the_switches_say(command: Run, artifact: Path) -> None:
    error = refusal(command("verify", artifact, *NPU, "--json", EMULATED_CANN_FAULTS="cube:hf32"))
    assert error["what"].startswith("matmul is not exact float32 on npu:0")
    assert "aten::addmm" in error["where"]
    assert error["expected"] == "an error below 1e-05"


def test_attention_alone_that_is_wrong_leaves_encoders_without_it_alone(command: Run, tmp_path: Path) -> None:
    convnext = export("tiny-convnext", weights="random:3", formats=("torchscript",), output=tmp_path / "convnext")
    done = command("verify", convnext, *NPU, EMULATED_CANN_FAULTS="attention:uniform")
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_fast_numerics_do_is_beyond_strict_limits_and_within_those_of_fast(
    command: Run, family_artifact: Path
) -> None:
    """HF32 products and GELU by tanh, as the published reports of fp32 on a 910B have them."""
    faults = {"EMULATED_CANN_FAULTS": "cube:hf32,gelu:tanh"}
    done = command("verify", family_artifact, *NPU, "--numerics", "fast", "--json", **faults)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    strict = {t["output"]: t["limit"] for t in record["tolerances"] if t["device"] == "cpu" and _is_scaled_rmse(t)}
    fast = {t["output"]: t["limit"] for t in record["tolerances"] if t["numerics"] == "fast" and _is_scaled_rmse(t)}
    for output in (output for output in record["steps"][0]["outputs"] if output["group"] is None):
        error = output["metrics"]["max_scaled_rmse"]
        assert 10 * strict[output["output"]] < error < fast[output["output"]]
    told = command("verify", family_artifact, *NPU, "--numerics", "fast", **faults).stdout
    assert "limits    on npu:0 those of fast numerics: products of TF32 or HF32 operands, GELU by tanh" in told


def _is_scaled_rmse(tolerance: dict[str, Any]) -> bool:
    return (tolerance["metric"], tolerance["group"]) == ("max_scaled_rmse", None)
