"""npu-export: what it prints where, its codes, and what it refuses."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from watching import ended_steps

from npu_export import plan, torchscript
from npu_export.checkpoint import Checkpoint
from npu_runtime.artifact.store import open_artifact

STEPS = (
    "find the weights and plan the keys",
    "load the weights",
    "record the reference",
    "measure what rounding does",
    "freeze torchscript, batch 1, 4",
    "freeze onnx, batch 1",
    "freeze onnx, batch 4",
    "hash the files and write the manifest",
    "check parity of torchscript",
    "check parity of onnx",
    "bring the files to the disk",
)
BASE = ("npu-export", "--model", "tiny-vit", "--weights", "random:5")


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_step_and_its_time_go_to_stderr_and_the_result_alone_to_stdout(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = run_command(*BASE, "--batch", "1,4", "--output", "a", cwd=tmp_path)
    assert run.returncode == 0
    narrated = [re.fullmatch(r"✓ (.+?) +\d+\.\d s(   .+)?", line) for line in ended_steps(run.stderr)]
    assert tuple(match[1] if match else None for match in narrated) == STEPS
    assert "✓" not in run.stdout
    assert run.stdout.startswith("weights   RANDOM weights (seed 5)")
    for name in ("model.ts", "model.b1.onnx", "model.b4.onnx", "weights.onnx.data", "reference.safetensors"):
        assert re.search(rf"^{re.escape(name)} +\d+\.\d kB$", run.stdout, re.MULTILINE)
    assert run.stdout.endswith("next      npu-runtime verify a\n")
    assert entries(tmp_path) == {"a"}


def test_the_result_as_json_is_the_manifest_on_disk(call: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "a"
    result = call(*BASE, "--format", "torchscript", "--output", output, "--json")
    assert result.code == 0
    artifact = open_artifact(output)
    written = json.loads((output / "manifest.json").read_text("utf-8"))
    assert written.pop("schema")
    assert result.json == {"artifact": str(output), "digest": artifact.digest, "manifest": written}
    assert written["provenance"]["weights"]["random_seed"] == 5
    assert {program["format"] for program in written["programs"]} == {"torchscript"}


def test_without_an_output_the_artifact_is_named_for_encoder_and_precision(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*BASE, "--format", "torchscript").code == 0
    assert entries(tmp_path) == {"tiny-vit-fp32"}
    open_artifact(tmp_path / "tiny-vit-fp32").check_files()


def test_a_dry_run_reads_no_tensor_and_writes_nothing(
    call: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safe_open = safetensors.safe_open

    class NoTensors:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._opened = safe_open(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._opened, name)

        def __enter__(self) -> NoTensors:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_tensor(self, name: str) -> torch.Tensor:
            raise AssertionError(f"the tensor {name} was read")

    monkeypatch.setattr(safetensors, "safe_open", NoTensors)
    monkeypatch.chdir(tmp_path)
    arguments = ("npu-export", "--model", "tiny-vit", "--weights", tiny_checkpoint)
    result = call(*arguments, "--batch", "1,4", "--output", "new/a", "--dry-run")
    assert result.code == 0
    assert entries(tmp_path) == set()
    assert "26 matched, 12 transformed, 0 dropped, 0 missing, 0 unexpected, 0 mismatched" in result.out
    assert "torchscript, onnx, opset 18, batch 1, 4" in result.out
    assert "new/a  (dry run: nothing was written)" in result.out
    assert [line[:2] for line in ended_steps(result.err)] == ["✓ "]
    with pytest.raises(AssertionError, match="was read"):
        call(*arguments, "--output", "new/a")


SIZE = "tiny-vit takes no images of this size"
WRONG_USAGE = {
    "encoder": (("--model", "vit-bose"), {"what": "unknown encoder 'vit-bose'", "next": "did you mean vit-base?"}),
    "layout": (("--layout", "meta"), {"what": "unknown layout", "expected": "auto, hf, timm, jax", "got": "meta"}),
    "image size": (
        ("--image-size", "30"),
        {
            "what": SIZE,
            "expected": "a multiple of 8 pixels up to 4096",
            "got": "30",
            "next": "the nearest is 32",
        },
    ),
    "image size too large": (("--image-size", "5000"), {"next": "the nearest is 4096", "got": "5000", "what": SIZE}),
    "image size 0": (("--image-size", "0"), {"next": "the nearest is 8", "got": "0", "what": SIZE}),
    "batch 0": (("--batch", "0"), {"what": "wrong batch sizes", "got": "0"}),
    "batch twice": (("--batch", "4,4"), {"what": "wrong batch sizes", "got": "4,4"}),
    "batch too large": (("--batch", "1025"), {"what": "wrong batch sizes", "got": "1025"}),
    "seed": (("--weights", "random:x"), {"what": "random weights need a seed", "got": "random:x"}),
    "opset without onnx": (
        ("--format", "torchscript", "--opset", "18"),
        {"what": "--opset is for onnx, which is not among the formats", "got": "torchscript"},
    ),
}


@pytest.mark.parametrize("name", WRONG_USAGE)
def test_wrong_usage_exits_with_2_and_says_what_and_what_is_possible(
    name: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    arguments, expected = WRONG_USAGE[name]
    result = call(*BASE, *arguments, "--output", tmp_path / "a", "--json")
    assert (result.code, result.json["exit_code"]) == (2, 2)
    assert expected.items() <= result.json["error"].items()
    assert f"error: {expected['what']}\n" in result.err
    for part in ("expected", "got", "next"):
        if part in expected:
            assert re.search(rf"^  {part}: +{re.escape(expected[part])}$", result.err, re.MULTILINE)
    assert entries(tmp_path) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch", "1"),
        ("--batch", "1024"),
        ("--layout", "hf"),
        ("--image-size", "8", "--batch", "1"),
        ("--image-size", "64"),
        ("--precision", "fp16"),
        ("--precision", "bf16", "--format", "torchscript"),
        ("--format", "onnx", "--opset", "18"),
        ("--format", "torchscript"),
    ],
)
def test_right_usage_beside_the_wrong_one_is_planned(arguments: tuple[str, ...], call: Callable[..., Any]) -> None:
    assert call(*BASE, *arguments, "--dry-run").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "om"), "'om' is not one of 'torchscript', 'onnx'"),
        (("--precision", "int8"), "'int8'"),
        (("--precision", "fp64"), "'fp64' is not one of 'fp32', 'fp16', 'bf16'"),
        (("--image-size", "224.5"), "'224.5' is not a valid integer"),
        (("--batch", "1,four"), "whole numbers such as 1,4,8, got '1,four'"),
        (("--batch", ""), "whole numbers such as 1,4,8, got ''"),
        (("--colour",), "No such option"),
    ],
)
def test_what_the_parser_refuses_exits_with_2_in_text_and_as_json(
    arguments: tuple[str, ...], message: str, call: Callable[..., Any]
) -> None:
    text = call(*BASE, *arguments)
    assert (text.code, text.out) == (2, "")
    assert message in text.err
    data = call(*BASE, "--json", *arguments)
    assert data.json["exit_code"] == data.code == 2
    assert message in data.json["error"]["what"]


def test_a_missing_model_exits_with_2_and_says_where_models_are_listed(call: Callable[..., Any]) -> None:
    result = call("npu-export")
    assert (result.code, result.out) == (2, "")
    assert "--model is missing; npu-export --list shows the encoders" in result.err


def test_an_error_of_the_checkpoint_exits_with_1_and_says_what_where_expected_got_and_next(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    result = call(
        "npu-export", "--model", "tiny-vit", "--weights", tmp_path / "weights", "--output", tmp_path / "a", "--json"
    )
    assert result.code == 1
    assert result.json == {
        "error": {
            "what": "the folder holds no weights",
            "where": str(tmp_path / "weights"),
            "expected": "model.safetensors or pytorch_model.bin or model.safetensors.index.json "
            "or pytorch_model.bin.index.json",
            "got": "an empty folder",
            "next": "pass the weights file itself with --weights",
        },
        "exit_code": 1,
    }
    for text in result.json["error"].values():
        assert text in result.err


def test_a_program_too_far_from_the_reference_exits_with_3_and_leaves_nothing(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze = torchscript.trace_frozen

    def perturbed(module: Any, *arguments: Any, **options: Any) -> Any:
        module.network.norm.bias.data += 0.01
        return freeze(module, *arguments, **options)

    monkeypatch.setattr(torchscript, "trace_frozen", perturbed)
    result = call(*BASE, "--format", "torchscript", "--output", tmp_path / "a", "--json")
    assert (result.code, result.json["exit_code"]) == (3, 3)
    assert "torchscript batch 1 embedding max_abs_error" in result.json["error"]["got"]
    assert entries(tmp_path) == set()


def test_a_missing_package_exits_with_4_and_says_how_to_install_it(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = call("npu-export", "--model", "tiny-vit", "--output", tmp_path / "a", "--json")
    assert (result.code, result.json["exit_code"]) == (4, 4)
    assert result.json["error"]["next"] == "pip install huggingface_hub, or pass a file with --weights"


@pytest.mark.parametrize("formats", [(), ("--format", "onnx")])
def test_onnx_in_bf16_exits_with_4_and_advice_before_the_weights_are_looked_for(
    formats: tuple[str, ...], call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "find_weights", lambda *_: pytest.fail("the weights were looked for"))
    result = call(*BASE, "--precision", "bf16", *formats, "--output", tmp_path / "a", "--json")
    assert (result.code, result.json["exit_code"]) == (4, 4)
    assert result.json["error"]["next"].startswith("choose --format torchscript for bf16")
    assert entries(tmp_path) == set()


def test_an_output_that_exists_is_refused_before_the_weights_are_looked_for(
    call: Callable[..., Any], artifact_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> Checkpoint:
        raise AssertionError("the weights were looked for")

    digest = open_artifact(artifact_copy).digest
    monkeypatch.setattr(plan, "find_weights", unreachable)
    for flags in ((), ("--dry-run",)):
        result = call(*BASE, "--output", artifact_copy, "--json", *flags)
        assert result.code == 2
        assert result.json["error"]["what"] == "the output exists"
        assert "--force" in result.json["error"]["next"]
    assert open_artifact(artifact_copy).digest == digest
    with pytest.raises(AssertionError, match="looked for"):
        call(*BASE, "--output", artifact_copy, "--force")


def test_force_replaces_an_artifact_and_nothing_else(call: Callable[..., Any], artifact_copy: Path) -> None:
    digest = open_artifact(artifact_copy).digest
    assert call(*BASE, "--format", "torchscript", "--output", artifact_copy, "--force").code == 0
    replaced = open_artifact(artifact_copy)
    replaced.check_files()
    assert replaced.digest != digest
    assert entries(artifact_copy) == {"manifest.json", "model.ts", "reference.safetensors"}
    assert entries(artifact_copy.parent) == {artifact_copy.name}

    thesis = artifact_copy.parent / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.txt").write_text("years of work")
    result = call(*BASE, "--output", thesis, "--force", "--json")
    assert (result.code, entries(thesis)) == (2, {"chapter1.txt"})
    assert "is not just an artifact" in result.json["error"]["what"]


def drop_root_powers() -> None:
    """File permissions bind the next program, also where the tests run as root."""
    libc = ctypes.CDLL(None)
    pr_capbset_drop, cap_dac_override, cap_dac_read_search = 24, 1, 2
    libc.prctl(pr_capbset_drop, cap_dac_override)
    libc.prctl(pr_capbset_drop, cap_dac_read_search)


@pytest.mark.parametrize("place", ["a folder without write permission", "below a file"])
def test_an_output_that_cannot_be_made_is_one_clear_error(
    place: str, run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    if place == "below a file":
        parent.write_text("a file")
    else:
        parent.mkdir(mode=0o500)
    run = run_command(*BASE, "--output", parent / "a", "--json", preexec_fn=drop_root_powers)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    error = json.loads(run.stdout)["error"]
    assert error["what"] == "the output cannot be written"
    assert error["where"] == str(parent / "a")
    assert os.path.isfile(parent) or entries(parent) == set()


def test_plan_export_and_inspection_tell_of_probes(
    call: Callable[..., Any], tmp_path: Path, tiny_artifact: Path
) -> None:
    planned = call("npu-export", "--model", "tiny-vit", "--weights", "random:3", "--probes", "--dry-run")
    assert "probes    4 boundaries: patch_embed, blocks.0, blocks.1, norm" in planned.out
    assert "probes.safetensors  32.9 kB" in planned.out
    without = call("npu-export", "--model", "tiny-vit", "--weights", "random:3", "--dry-run", "--json")
    assert without.json["probes"] == []
    output = tmp_path / "a"
    made = call("npu-export", "--model", "tiny-vit", "--weights", "random:3", "--probes", "--output", output)
    assert made.code == 0, made.err
    assert "find the blocks in onnx" in made.err
    assert "2 blocks and 2 other boundaries, batch 1" in made.err
    shown = call("npu-runtime", "inspect", output)
    assert "probes    4 boundaries, patch_embed to norm, batch 1; limits 10 times" in shown.out
    without_probes = call("npu-runtime", "inspect", tiny_artifact)
    assert "probes    none; export with --probes to find faults by block" in without_probes.out
