from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frozen_faults
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from npu_export.pipeline import export
from npu_runtime.artifact.store import open_artifact
from npu_runtime.parity.record_files import read_record

HERE = Path(__file__).parent


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two images of other sizes than the encoder's."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (50, 40)), ("b.png", (33, 70))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    return folder


def test_a_whole_artifact_passes_step_by_step(call: Callable[..., Any], tiny_artifact: Path) -> None:
    result = call("npu-runtime", "parity", tiny_artifact)
    assert result.code == 0, result.err
    for title in ("eager fp32 on cpu", "torchscript fp32 on cpu", "onnxruntime fp32 on cpu"):
        assert title in result.out
    assert "stored reference" in result.out
    assert "  patches" in result.out
    assert result.out.endswith("parity passed\n")
    assert "✓ torchscript fp32 on cpu, 5 images" in result.err


def test_the_default_seeds_are_the_fields_own(call: Callable[..., Any], tiny_artifact: Path) -> None:
    record = call("npu-runtime", "parity", tiny_artifact, "--json").json
    assert [i["name"] for i in record["inputs"]] == [f"seed {seed}" for seed in (42, 123, 256, 789, 1024)]
    assert all(len(i["sha256"]) == 64 for i in record["inputs"])


def test_images_and_arrays_and_seeds_are_run_together(
    call: Callable[..., Any], tiny_artifact: Path, photographs: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 32, 32), np.float32))
    line = ("--seeds", "7", "--images", photographs, "--arrays", tmp_path / "x.npy", "--json")
    record = call("npu-runtime", "parity", tiny_artifact, *line).json
    assert [i["kind"] for i in record["inputs"]] == ["seed", "image", "image", "array", "array"]
    without = call("npu-runtime", "parity", tiny_artifact, "--images", photographs, "--json").json
    assert [i["kind"] for i in without["inputs"]] == ["image", "image"]


def test_a_bad_image_is_named_the_others_go_on_and_the_exit_code_tells(
    call: Callable[..., Any], tiny_artifact: Path, photographs: Path
) -> None:
    (photographs / "c.png").write_bytes(b"\x89PNG broken")
    result = call("npu-runtime", "parity", tiny_artifact, "--images", photographs, "--json")
    assert result.code == 1
    assert result.json["passed"] is True
    assert [Path(s["name"]).name for s in result.json["skipped"]] == ["c.png"]
    assert "c.png" in result.json["error"]["where"]
    assert call("npu-runtime", "parity", tiny_artifact, "--images", photographs, "--skip-bad").code == 0


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (("--images", "absent.png"), 1, "there is no such image"),
        (("--seeds", "1,x"), 2, "whole numbers"),
        (("--tolerance", "tokens.min_cosine=0.9"), 2, "tokens.max_abs_error=LIMIT"),
        (("--tolerance", "tokens.max_abs_error=nan"), 2, "a number of 0 or more"),
        (("--backend", "tensorrt"), 2, "unknown backend"),
        (("--record", "absent/r.json"), 2, "the folder of the output does not exist"),
        (("--weights", "absent"), 1, "absent"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(
    call: Callable[..., Any], tiny_artifact: Path, line: tuple[str, ...], code: int, told: str
) -> None:
    result = call("npu-runtime", "parity", tiny_artifact, *line)
    assert result.code == code, result.err
    assert told in result.err


def test_an_artifact_without_the_backends_program_is_refused(
    call: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    export = ("--model", "tiny-vit", "--weights", tiny_checkpoint, "--format", "onnx", "--output", tmp_path / "x")
    assert call("npu-export", *export).code == 0
    result = call("npu-runtime", "parity", tmp_path / "x", "--backend", "torchscript")
    assert (result.code, "no program for the backend torchscript" in result.err) == (2, True)


def test_a_reference_whose_hash_differs_is_refused(call: Callable[..., Any], artifact_copy: Path) -> None:
    with (artifact_copy / "reference.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    result = call("npu-runtime", "parity", artifact_copy)
    assert (result.code, "reference.safetensors" in result.err) == (1, True)


def test_inputs_that_nothing_can_be_compared_on_are_not_dropped_in_silence(
    call: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None]
) -> None:
    rewrite(artifact_copy, lambda document: document["provenance"]["weights"].update(source="/gone"))
    result = call("npu-runtime", "parity", artifact_copy, "--seeds", "1", "--json")
    assert result.code == 4
    assert "the inputs could not be run" in result.json["error"]["what"]
    assert [step["status"] for step in result.json["steps"]] == ["not run", "passed", "passed"]
    assert call("npu-runtime", "parity", artifact_copy).code == 0


def test_one_batch_size_is_run_the_smallest_or_the_one_asked_for(call: Callable[..., Any], tiny_artifact: Path) -> None:
    for line, batches in (((), [1]), (("--batch", "4"), [4])):
        record = call("npu-runtime", "parity", tiny_artifact, "--seeds", "1,2", *line, "--json").json
        assert [step["batches"] for step in record["steps"]] == [batches] * 3
    refused = call("npu-runtime", "parity", tiny_artifact, "--batch", "3")
    assert (refused.code, "not frozen for this batch size" in refused.err) == (2, True)


def test_a_failing_step_is_named_with_exit_code_3_and_the_worst_input_saved(
    call: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None], tmp_path: Path
) -> None:
    frozen_faults.perturb_torchscript(artifact_copy)
    rewrite(artifact_copy)
    worst, record = tmp_path / "worst.safetensors", tmp_path / "r.json"
    result = call("npu-runtime", "parity", artifact_copy, "--save-worst", worst, "--record", record)
    assert result.code == 3
    assert "parity FAILED at the step export: torchscript fp32 on cpu" in result.out
    assert "the first step beyond its tolerance is export" in result.err
    saved = load_file(worst)
    assert {name: list(array.shape) for name, array in saved.items()} == {
        "pixel_values": [1, 3, 32, 32],
        "actual.embedding": [1, 64],
        "expected.embedding": [1, 64],
        "actual.tokens": [1, 17, 64],
        "expected.tokens": [1, 17, 64],
    }
    read = read_record(record)
    assert (read.cause, read.passed) == ("export", False)
    # What was saved is an input itself, and fails in the same way.
    again = call("npu-runtime", "parity", artifact_copy, "--arrays", worst, "--json")
    assert (again.code, again.json["error"]["what"]) == (3, "the first step beyond its tolerance is export")
    step = next(step for step in read.steps if step.status == "failed")
    assert again.json["steps"][1]["outputs"][0]["images"][0]["max_abs_error"] == pytest.approx(
        next(o.images[step.inputs.index(str(step.worst))].max_abs_error for o in step.outputs)
    )


def test_a_tolerance_of_ones_own_is_used_and_recorded(
    call: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None]
) -> None:
    frozen_faults.perturb_torchscript(artifact_copy)
    rewrite(artifact_copy)
    names = list(dict.fromkeys(t.name for t in open_artifact(artifact_copy).manifest.tolerances))
    assert "tokens.cls.max_scaled_error" in names
    given = [f"{name}=10" for name in names]
    line = [part for text in given for part in ("--tolerance", text)]
    result = call("npu-runtime", "parity", artifact_copy, *line, "--json")
    assert result.code == 0
    assert [t["limit"] for t in result.json["overridden"]] == [10.0] * len(names)
    assert {t["limit"] for t in result.json["tolerances"]} == {10.0}
    told = call("npu-runtime", "parity", artifact_copy, *line).out
    assert "tolerance tokens.max_abs_error 10, given as --tolerance tokens.max_abs_error=10" in told


def test_the_reports_criteria_stand_beside_ours_and_decide_nothing(
    call: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None]
) -> None:
    frozen_faults.perturb_torchscript(artifact_copy)
    rewrite(artifact_copy)
    result = call("npu-runtime", "parity", artifact_copy, "--profile", "reports", "--json")
    assert (result.code, result.json["profile"]) == (3, "reports")
    failed = next(step for step in result.json["steps"] if step["status"] == "failed")
    checks = failed["outputs"][0]["profile"]
    assert {check["metric"] for check in checks} >= {"mean_relative_error", "trimmed_relative_error", "mean_cosine"}
    cosine = next(check for check in checks if check["metric"] == "mean_cosine")
    assert (cosine["passed"], cosine["comparison"]) == (True, "at least"), (
        "the fault that ours finds and theirs does not"
    )
    assert "which decide nothing here" in call("npu-runtime", "parity", artifact_copy, "--profile", "reports").out


def test_existing_files_are_not_replaced_without_force(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "r.json"
    kept.write_text("kept", "utf-8")
    result = call("npu-runtime", "parity", tiny_artifact, "--record", kept)
    assert (result.code, kept.read_text("utf-8")) == (2, "kept")
    assert call("npu-runtime", "parity", tiny_artifact, "--seeds", "1", "--record", kept, "--force").code == 0
    assert read_record(kept).passed


def test_a_device_that_is_not_here_exits_with_4_after_what_could_be_run(
    call: Callable[..., Any], tiny_artifact: Path
) -> None:
    result = call("npu-runtime", "parity", tiny_artifact, "--device", "npu:0", "--seeds", "1", "--json")
    assert result.code == 4
    assert [(s["device"], s["status"]) for s in result.json["steps"]] == [
        *[("cpu", "passed")] * 3,
        *[("npu:0", "not run")] * 3,
    ]
    assert result.json["error"]["what"] == "nothing could be run on npu:0"


def test_a_record_is_shown_anywhere_and_compared_only_with_what_differs_said(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "1.json", tmp_path / "2.json"
    for path, seeds in ((one, "1"), (other, "1,2")):
        assert call("npu-runtime", "parity", tiny_artifact, "--seeds", seeds, "--record", path).code == 0
    shown = call("npu-runtime", "show", one)
    assert (shown.code, "parity passed" in shown.out, "made on" in shown.out) == (0, True, True)
    compared = call("npu-runtime", "show", one, "--against", other)
    assert "not alike inputs: 1 and 2" in compared.out
    assert "max rel L2 against" in compared.out
    verified = tmp_path / "v.json"
    verified.write_text(call("npu-runtime", "verify", tiny_artifact, "--json").out, "utf-8")
    assert "parity passed" in call("npu-runtime", "show", verified).out
    damaged = call("npu-runtime", "show", tiny_artifact / "manifest.json")
    assert (damaged.code, "this is no record that show prints" in damaged.err) == (1, True)


def test_ctrl_c_keeps_what_was_measured_and_marks_it_partial(tiny_artifact: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((3000, 3, 32, 32), np.float32))
    line = [sys.executable, HERE.parent / "tiny.py", "npu-runtime", "parity", tiny_artifact, "--threads", "1"]
    process = subprocess.Popen(
        [*map(str, line), "--arrays", str(tmp_path / "x.npy"), "--record", str(tmp_path / "r.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    for told in process.stderr:  # of the first step, when the next is about to run
        if told.startswith("✓ eager fp32 on cpu".encode()):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    document = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert (document["partial"], document["passed"]) == (True, False)
    assert document["steps"][0]["status"] == "passed"
    assert document["steps"][1]["status"] == "interrupted"
    assert b"interrupted" in out


@pytest.fixture
def probed(tmp_path: Path) -> Path:
    return export("tiny-vit", weights="random:3", probes=True, output=tmp_path / "probed")


def test_localise_names_the_block_and_the_record_keeps_every_boundary(
    call: Callable[..., Any], probed: Path, rewrite: Callable[..., None], tmp_path: Path
) -> None:
    clean = call("npu-runtime", "parity", probed, "--seeds", "1", "--localise")
    assert clean.code == 0
    assert clean.out.count("all 4 boundaries are within their limits") == 2
    frozen_faults.change_weight(probed, "onnx", "blocks.1", frozen_faults.scale)
    rewrite(probed)
    found = call("npu-runtime", "parity", probed, "--seeds", "1", "--localise", "--record", tmp_path / "r.json")
    assert found.code == 3
    assert "localised onnxruntime on cpu: the first boundary beyond its limit is blocks.1" in found.out
    assert "localised torchscript" not in found.out
    (localised,) = read_record(tmp_path / "r.json").localised
    assert (localised.first, localised.failed_plain) == ("blocks.1", ("embedding", "tokens"))
    assert "the first boundary beyond its limit is blocks.1" in call("npu-runtime", "show", tmp_path / "r.json").out


def test_localise_without_probes_is_refused_before_anything_runs(call: Callable[..., Any], tiny_artifact: Path) -> None:
    result = call("npu-runtime", "parity", tiny_artifact, "--localise")
    assert (result.code, "export again with --probes" in result.err, "eager" in result.err) == (2, True, False)


def test_a_record_without_figures_by_channel_is_shown_and_reported(call: Callable[..., Any], tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "data/records/parity-1.2.json"
    shown = call("npu-runtime", "show", old)
    assert (shown.code, "parity passed" in shown.out) == (0, True)
    assert call("npu-runtime", "show", old, "--against", old).code == 0
    page = tmp_path / "page.html"
    assert call("npu-runtime", "report", old, "--output", page).code == 0
    assert "max RMS error over the channels" in page.read_text("utf-8")
