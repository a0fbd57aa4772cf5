"""npu-runtime inspect and verify."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from watching import ended_steps

from npu_runtime.artifact import store
from npu_runtime.artifact.schema import SCHEMA_MAJOR, SCHEMA_MINOR
from npu_runtime.artifact.store import open_artifact

RANDOM = "weights   RANDOM weights (seed 5), not a trained encoder"


def test_the_help_names_every_subcommand_and_the_exit_codes(call: Callable[..., Any]) -> None:
    result = call("npu-runtime", "--help")
    assert result.code == 0
    for text in ("inspect", "verify", "bench", "embed", "3 parity failed", "4 device or dependency missing"):
        assert text in " ".join(result.out.split())


def test_inspect_shows_weights_interface_programs_and_files(call: Callable[..., Any], tiny_artifact: Path) -> None:
    result = call("npu-runtime", "inspect", tiny_artifact)
    assert (result.code, result.err) == (0, "")
    manifest = open_artifact(tiny_artifact).manifest
    assert f"weights   {manifest.provenance.weights.source} (layout hf)" in result.out
    assert "input     pixel_values float32 [B, 3, 32, 32]" in result.out
    assert "output    tokens float32 [B, 17, 64]" in result.out
    assert open_artifact(tiny_artifact).digest in result.out
    rows = [line.split() for line in result.out.splitlines()]
    assert ["torchscript", "model.ts", "b4", "4", "-"] in rows
    assert ["onnx", "model.b1.onnx", "-", "1", "18"] in rows
    for record in manifest.files:
        assert [record.file, record.sha256[:16]] in [row[:2] for row in rows]


def test_inspect_as_json_is_the_manifest(call: Callable[..., Any], tiny_artifact: Path) -> None:
    shown = call("npu-runtime", "inspect", tiny_artifact, "--json").json
    written = json.loads((tiny_artifact / "manifest.json").read_text("utf-8"))
    del written["schema"]
    assert shown == {"artifact": str(tiny_artifact), "digest": open_artifact(tiny_artifact).digest, "manifest": written}


@pytest.mark.parametrize(
    ("edge", "shown"), [(None, "squashed to 32 x 32, bilinear"), (36, "shorter side to 36, centre 32 x 32, bilinear")]
)
def test_inspect_says_how_images_are_resized(
    edge: int | None, shown: str, call: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None]
) -> None:
    rewrite(artifact_copy, lambda manifest: manifest["preprocessing"].update(shortest_edge=edge))
    assert f"images    {shown}" in call("npu-runtime", "inspect", artifact_copy).out


@pytest.mark.parametrize("command", ["inspect", "verify", "bench"])
def test_an_artifact_of_schema_1_is_refused_with_what_to_do(
    command: str, call: Callable[..., Any], artifact_copy: Path
) -> None:
    shutil.copy(Path(__file__).parents[1] / "data" / "manifests" / "1.0.json", artifact_copy / "manifest.json")
    result = call("npu-runtime", command, artifact_copy, "--json")
    assert (result.code, result.json["exit_code"]) == (1, 1)
    assert result.json["error"]["next"] == "export it again"
    assert result.json["error"]["got"] == "schema 1.0"


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect",),
        ("verify", "--backend", "torchscript"),
        ("bench", "--backend", "torchscript", "--iterations", "1", "--warmup", "1"),
        ("embed", "chelsea.jpg", "--output", "f.npy"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_says_that_the_weights_are_random(
    arguments: tuple[str, ...],
    call: Callable[..., Any],
    random_artifact: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(photographs / "chelsea.jpg", tmp_path)
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    text = call("npu-runtime", command, random_artifact, *rest)
    assert text.code == 0
    assert RANDOM in text.out.splitlines()
    if command == "embed":
        rest.append("--force")
    data = call("npu-runtime", command, random_artifact, *rest, "--json").json
    if command == "embed":
        assert data["weights"] == RANDOM.split(maxsplit=1)[1]
    else:
        weights = (
            data["manifest"]["provenance"]["weights"]
            if command == "inspect"
            else (data["artifact"] if command == "verify" else data)["weights"]
        )
        assert weights["random_seed"] == 5


def test_weights_that_are_not_random_are_not_called_so(call: Callable[..., Any], tiny_artifact: Path) -> None:
    assert "RANDOM" not in call("npu-runtime", "inspect", tiny_artifact).out


def test_verify_passes_each_output_of_each_program(call: Callable[..., Any], tiny_artifact: Path) -> None:
    result = call("npu-runtime", "verify", tiny_artifact)
    assert result.code == 0
    lines = [line.split() for line in result.out.splitlines() if line.endswith("pass")]
    steps = [(backend, batch) for backend in ("torchscript", "onnxruntime") for batch in ("1", "4")]
    assert [(row[0], row[6]) for row in lines if row[0] in ("torchscript", "onnxruntime")] == steps
    assert [next(o for o in ("embedding", "tokens") if o in row) for row in lines] == ["embedding", "tokens"] * 4
    assert result.out.startswith("files     5, each as recorded\n")
    assert result.out.endswith("parity passed\n")
    assert [line.split("  ")[0] for line in ended_steps(result.err)] == [
        "✓ hash the files",
        "✓ run torchscript",
        "✓ run onnxruntime",
    ]


def test_verify_as_json_is_a_record_with_figures_limits_and_machine(
    call: Callable[..., Any], tiny_artifact: Path
) -> None:
    record = call("npu-runtime", "verify", tiny_artifact, "--json").json
    assert (record["record"], record["command"]) == ("parity", "verify")
    assert record["artifact"]["digest"] == open_artifact(tiny_artifact).digest
    assert record["passed"] is True
    assert {step["backend"] for step in record["steps"]} == {"torchscript", "onnxruntime"}
    for step in record["steps"]:
        assert step["status"] == "passed"
        for output in (output for output in step["outputs"] if output["group"] is None):
            checks = output["checks"]
            assert {check["metric"] for check in checks} == {
                "max_abs_error",
                "max_relative_l2_error",
                "max_scaled_error",
                "max_scaled_rmse",
            }
            assert all(check["value"] == output["metrics"][check["metric"]] <= check["limit"] for check in checks)
    assert record["environment"]["versions"]["torch"]


def test_verify_exits_with_3_when_a_programs_numbers_changed(
    call: Callable[..., Any], artifact_copy: Path, perturb_onnx: Callable[[Path], None], rewrite: Callable[..., None]
) -> None:
    perturb_onnx(artifact_copy)
    rewrite(artifact_copy)
    result = call("npu-runtime", "verify", artifact_copy, "--json")
    assert result.code == 3
    record = result.json
    assert record["passed"] is False
    assert {step["backend"] for step in record["steps"] if step["status"] == "failed"} == {"onnxruntime"}
    assert record["exit_code"] == 3
    assert "onnxruntime batch 4: " in record["error"]["got"]
    assert f"error: {record['error']['what']}" in result.err

    text = call("npu-runtime", "verify", artifact_copy)
    assert text.code == 3
    assert "parity FAILED at the step export: onnxruntime fp32 on cpu" in text.out
    assert call("npu-runtime", "verify", artifact_copy, "--backend", "torchscript").code == 0


def change_a_byte(artifact: Path) -> None:
    with (artifact / "model.ts").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


def newer_major(manifest: dict[str, Any]) -> None:
    manifest["schema"] = f"{SCHEMA_MAJOR + 1}.0"


def newer_minor(manifest: dict[str, Any]) -> None:
    manifest.update(schema=f"{SCHEMA_MAJOR}.{SCHEMA_MINOR + 9}", colour="blue")


def leaves_the_folder(manifest: dict[str, Any]) -> None:
    manifest["files"].append({"file": "../secret", "nbytes": 1, "sha256": "0" * 64})


def is_listed_twice_in_a_subfolder(manifest: dict[str, Any]) -> None:
    manifest["files"].append(dict(manifest["files"][0], file="sub/extra"))


DAMAGES: dict[str, tuple[Callable[[Path, Callable[..., None]], object], str, str]] = {
    "a changed byte": (lambda a, rewrite: change_a_byte(a), "a file of the artifact has changed", "model.ts"),
    "a missing file": (lambda a, rewrite: (a / "weights.onnx.data").unlink(), "lacks a file", "weights.onnx.data"),
    "a shorter file": (lambda a, rewrite: os.truncate(a / "model.ts", 9), "has another size", "model.ts"),
    "a path outside": (
        lambda a, rewrite: rewrite(a, leaves_the_folder),
        "a path outside the artifact",
        "manifest.json",
    ),
    "a newer major": (lambda a, rewrite: rewrite(a, newer_major), "another major schema version", "manifest.json"),
    "no manifest": (lambda a, rewrite: (a / "manifest.json").unlink(), "there is no artifact here", ""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_exits_with_1_and_names_what_is_wrong(
    name: str, call: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None]
) -> None:
    damage, what, where = DAMAGES[name]
    damage(artifact_copy, rewrite)
    result = call("npu-runtime", "verify", artifact_copy, "--json")
    assert (result.code, result.json["exit_code"]) == (1, 1)
    assert what in result.json["error"]["what"]
    assert result.json["error"]["where"].endswith(where)
    assert f"error: {result.json['error']['what']}" in result.err
    assert "run torchscript" not in result.err


def test_verify_passes_a_newer_minor_and_files_in_subfolders(
    call: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None]
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        newer_minor(manifest)
        is_listed_twice_in_a_subfolder(manifest)

    first = open_artifact(artifact_copy).manifest.files[0].file
    (artifact_copy / "sub").mkdir()
    shutil.copy(artifact_copy / first, artifact_copy / "sub" / "extra")
    rewrite(artifact_copy, change)
    assert call("npu-runtime", "verify", artifact_copy, "--backend", "onnx").code == 0


def test_verify_of_nothing_exits_with_1_and_says_what_is_expected(call: Callable[..., Any], tmp_path: Path) -> None:
    result = call("npu-runtime", "verify", tmp_path / "nothing", "--json")
    assert result.code == 1
    assert result.json["error"]["what"] == "there is no such folder"
    assert "manifest.json" in result.json["error"]["expected"]


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (("--backend", "openvino"), 2, "unknown backend 'openvino'"),
        (("--device", "tpu"), 2, "unknown device"),
        (("--device", "npu:0"), 4, "the device npu needs the package torch_npu"),
    ],
)
def test_verify_with_what_does_not_exist_or_is_not_here(
    arguments: tuple[str, str], code: int, what: str, call: Callable[..., Any], tiny_artifact: Path
) -> None:
    result = call("npu-runtime", "verify", tiny_artifact, *arguments, "--json")
    assert (result.code, result.json["exit_code"]) == (code, code)
    assert what in result.json["error"]["what"]
    assert "expected" in result.json["error"]


def test_what_the_parser_refuses_is_data_as_well(call: Callable[..., Any], tiny_artifact: Path) -> None:
    for arguments in (
        ("verify", "--json"),
        ("verify", tiny_artifact, "--threads", "0", "--json"),
        ("nonsense", "--json"),
    ):
        result = call("npu-runtime", *arguments)
        assert (result.code, result.json["exit_code"]) == (2, 2)
        assert result.json["error"]["what"] in result.err


def test_a_manifest_that_may_not_be_read_is_one_clear_error(call: Callable[..., Any], artifact_copy: Path) -> None:
    (artifact_copy / "manifest.json").unlink()
    (artifact_copy / "manifest.json").mkdir()
    result = call("npu-runtime", "inspect", artifact_copy, "--json")
    assert result.code == 1
    assert result.json["error"]["what"] == "the manifest cannot be read"


def test_an_error_of_the_system_is_one_clear_message(
    call: Callable[..., Any], tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refused(path: Path, *_: object) -> str:
        with open(path / "below a file"):
            raise AssertionError

    monkeypatch.setattr(store, "sha256_file", refused)
    result = call("npu-runtime", "verify", tiny_artifact, "--json")
    assert result.code == 1
    assert result.json["error"]["got"].endswith("Not a directory")
    assert str(tiny_artifact) in result.json["error"]["where"]
    assert "Traceback" not in result.err


def test_a_reader_of_stdout_that_goes_away_is_no_traceback(tiny_artifact: Path) -> None:
    code = "import sys; from npu_runtime.cli import main; sys.argv[0] = 'npu-runtime'; main()"
    command = [sys.executable, "-c", code, "inspect", str(tiny_artifact), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert err == ""
