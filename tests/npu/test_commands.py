"""The command line and `load` on the vendor's torch_npu over the emulated CANN, each in a process of its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frozen_faults
import pytest
import tiny
from PIL import Image

from npu_export.encoders.spec import EncoderSpec
from npu_export.pipeline import export

NPU = ("--device", "npu:0")
Run = Callable[..., subprocess.CompletedProcess[str]]


def conditions(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["steps"][0]["conditions"]
    return found


def test_torchscript_of_every_family_agrees_with_the_reference_and_runs_nothing_on_the_cpu(
    family_artifact: Path, command: Run, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    done = command("verify", family_artifact, *NPU, "--json", EMULATED_CANN_LOG=log)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert record["passed"] is True
    assert {step["device"] for step in record["steps"]} == {"npu:0"}
    assert all(o["metrics"]["max_abs_error"] < 1e-5 for step in record["steps"] for o in step["outputs"])
    report = conditions(record)
    assert report["fallback"] == []
    assert report["numerics"]["torch.npu.conv.allow_hf32"] is False
    measured = {kind: error for kind, error in report["arithmetic"].items() if isinstance(error, float)}
    assert measured.keys() >= {"matmul", "conv"}
    assert max(measured.values()) < 1e-6
    assert "fall back to run on the CPU" not in done.stderr
    launches = [line.split()[1] for line in log.read_text("utf-8").splitlines() if line.startswith("launch ")]
    assert len(launches) > 50
    assert not {"aclnnGelu", "aclnnLayerNorm"} & set(launches)  # those of the exact formulas instead


def test_eager_of_every_family_agrees_with_the_reference(script: Run, family_artifact: Path) -> None:
    done = script(
        """
from npu_runtime.artifact.store import open_artifact
from npu_runtime.parity.verify import measure_parity
for row in measure_parity(open_artifact(sys.argv[1]), backend="eager", device="npu:1"):
    assert row.status == "passed" and row.conditions.fallback == (), row
    print(row.device, row.batches[0])
""",
        family_artifact,
    )
    assert done.stdout.startswith("npu:1 1\n")


def steps_of(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str, str]]:
    return [(step["backend"], step["device"], step["status"]) for step in json.loads(done.stdout)["steps"]]


def test_the_ladder_of_every_family_passes_from_eager_to_the_device(family_artifact: Path, command: Run) -> None:
    done = command("parity", family_artifact, *NPU, "--seeds", "42,123", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps_of(done) == [
        ("eager", "cpu", "passed"),
        ("torchscript", "cpu", "passed"),
        ("eager", "npu:0", "passed"),
        ("torchscript", "npu:0", "passed"),
    ]
    record = json.loads(done.stdout)
    assert [step["baseline"] for step in record["steps"]] == ["stored reference", *["eager fp32 on cpu"] * 3]
    assert record["steps"][3]["conditions"]["arithmetic"]["matmul"] < 1e-6
    assert record["accelerator"]["name"]


def test_the_ladder_names_precision_for_hf32(family_artifact: Path, command: Run) -> None:
    """Within the limits of fast numerics, and beyond those of exact products, which are given here."""
    fast = (*NPU, "--numerics", "fast", "--seeds", "42", "--json")
    done = command("parity", family_artifact, *fast)
    assert done.returncode == 0, done.stdout + done.stderr
    done = command("parity", family_artifact, *fast, "--tolerance", "embedding.max_scaled_rmse=1e-5")
    assert done.returncode == 3, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert (record["cause"], record["first_failure"]) == ("precision", "eager fp32 on npu:0")
    assert steps_of(done)[:2] == [("eager", "cpu", "passed"), ("torchscript", "cpu", "passed")]


def test_the_ladder_names_the_device_for_its_approximate_gelu(family_artifact: Path, command: Run) -> None:
    if "aimv2" in family_artifact.name:
        pytest.skip("AIMv2 has no GELU")
    done = command("parity", family_artifact, *NPU, "--seeds", "42", "--json", EMULATED_CANN_FAULTS="gelu:tanh")
    assert done.returncode == 3, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert (record["cause"], record["first_failure"]) == ("device", "eager fp32 on npu:0")
    assert "gelu is not exact" in record["error"]["got"]


def test_the_ladder_names_the_export_for_what_only_the_frozen_program_does(
    command: Run, artifact: Path, tmp_path: Path, rewrite: Callable[..., None]
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    frozen_faults.perturb_torchscript(copy)
    rewrite(copy)
    done = command("parity", copy, *NPU, "--json")
    assert done.returncode == 3, done.stdout + done.stderr
    assert (json.loads(done.stdout)["cause"], json.loads(done.stdout)["first_failure"]) == (
        "export",
        "torchscript fp32 on cpu",
    )
    assert [status for *_, status in steps_of(done)] == ["passed", "failed", "passed", "failed"]


def test_an_operator_without_a_kernel_leaves_the_steps_on_the_device_not_run(command: Run, artifact: Path) -> None:
    done = command("parity", artifact, *NPU, "--json", EMULATED_CANN_FAULTS="no-kernel:aten::gelu")
    assert done.returncode == 4, done.stdout + done.stderr
    assert [status for *_, status in steps_of(done)] == ["passed", "passed", "not run", "not run"]
    assert "aten::gelu" in json.loads(done.stdout)["error"]["got"]


def test_without_the_checkpoint_the_device_answers_to_the_programs_on_the_cpu(
    command: Run, artifact: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    document = json.loads((copy / "manifest.json").read_text("utf-8"))
    document["provenance"]["weights"].update(source=str(tmp_path / "gone"), random_seed=None)
    (copy / "manifest.json").write_text(json.dumps(document), "utf-8")
    done = command("parity", copy, *NPU, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [status for *_, status in steps_of(done)] == ["not run", "passed", "not run", "passed"]
    baselines = [step["baseline"] for step in json.loads(done.stdout)["steps"]]
    assert (baselines[1], baselines[3]) == ("stored reference", "torchscript fp32 on cpu")


def test_hf32_that_is_left_on_is_named_and_judged_by_limits_of_its_own(command: Run, tmp_path: Path) -> None:
    output = export("tiny-convnext", weights="random:3", formats=("torchscript",), output=tmp_path / "convnext")
    done = command("verify", output, *NPU, "--numerics", "fast", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    strict = next(t["limit"] for t in record["tolerances"] if t["device"] == "cpu" and t["metric"] == "max_abs_error")
    assert record["steps"][0]["outputs"][0]["metrics"]["max_abs_error"] > 10 * strict  # the margin of an NPU
    report = conditions(record)
    assert report["numerics"]["numerics"] == "fast"
    assert report["numerics"]["torch.npu.conv.allow_hf32"] is True
    assert report["arithmetic"]["conv"] > 1e-5


def test_a_switch_thrown_beside_an_open_encoder_is_found_and_all_are_put_back(script: Run, artifact: Path) -> None:
    script(
        """
import torch, npu_runtime, numpy as np
import torch_npu
assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (True, False)
encoder = npu_runtime.load(sys.argv[1], device="npu:0")
assert torch.npu.conv.allow_hf32 is False
encoder.report()
torch.npu.conv.allow_hf32 = True
try:
    encoder.report()
except npu_runtime.ProgramError as error:
    assert "conv.allow_hf32=True, expected False" in error.got
else:
    raise SystemExit("not found")
torch.npu.matmul.allow_hf32 = True
encoder.close()
assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (True, False)
""",
        artifact,
    )


def test_a_gelu_before_the_encoder_was_loaded_makes_strict_numerics_impossible(script: Run, artifact: Path) -> None:
    script(
        """
import torch, npu_runtime
torch.nn.functional.gelu(torch.ones(3, device="npu:0"))
try:
    npu_runtime.load(sys.argv[1], device="npu:0")
except npu_runtime.ProgramError as error:
    assert error.what.startswith("gelu is not exact float32 on npu:0") and error.where == "aten::gelu", error
    assert "before anything else" in error.hint
else:
    raise SystemExit("loaded")
assert torch.npu.conv.allow_hf32 is True
npu_runtime.load(sys.argv[1], device="npu:0", numerics="fast").close()
""",
        artifact,
    )


def test_without_the_exact_gelu_only_encoders_that_use_it_are_refused(
    command: Run, artifact: Path, tmp_path: Path
) -> None:
    done = command("verify", artifact, *NPU, "--json", EMULATED_CANN_FAULTS="gelu:tanh")
    assert (done.returncode, "gelu is not exact" in done.stdout) == (1, True)
    silu = export("tiny-aimv2", weights="random:3", formats=("torchscript",), output=tmp_path / "aimv2")
    assert command("verify", silu, *NPU, EMULATED_CANN_FAULTS="gelu:tanh").returncode == 0


def test_an_operator_without_a_kernel_is_refused_by_name_unless_it_is_allowed(command: Run, artifact: Path) -> None:
    """By torch_npu's variable where its version has one, which the command sets, else by the table of kernels."""
    refused = command("verify", artifact, *NPU, "--json", EMULATED_CANN_FAULTS="no-kernel:aten::gelu")
    assert refused.returncode == 4, refused.stdout + refused.stderr
    assert json.loads(refused.stdout)["error"]["got"] == "aten::gelu"
    allowed = command(
        "verify", artifact, *NPU, "--allow-fallback", "--json", EMULATED_CANN_FAULTS="no-kernel:aten::gelu"
    )
    assert allowed.returncode == 0, allowed.stdout + allowed.stderr
    assert conditions(json.loads(allowed.stdout))["fallback"] == ["aten::gelu"]
    told = command("verify", artifact, *NPU, "--allow-fallback", EMULATED_CANN_FAULTS="no-kernel:aten::gelu")
    assert "on the CPU, as was allowed: aten::gelu" in told.stdout


def test_graphs_are_captured_replayed_and_compared_with_plain_calls(
    command: Run, artifact: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    done = command("verify", artifact, *NPU, "--graph", "on", "--json", EMULATED_CANN_LOG=log)
    assert done.returncode == 0, done.stdout + done.stderr
    graphs = [row["conditions"]["graphs"] for row in json.loads(done.stdout)["steps"]]
    assert {graph["batch"] for row in graphs for graph in row} == {1, 2, 4}
    assert all((graph["replayed"], graph["max_abs_difference"]) == (True, 0.0) for row in graphs for graph in row)
    events = log.read_text("utf-8").split("\n")
    assert events.count("aclmdlRICaptureBegin") == 3
    assert events.count("aclmdlRIExecuteAsync") > 3


@pytest.mark.parametrize(
    ("switch", "value", "reason"),
    [("EMULATED_CANN_FAULTS", "aclmdlRICaptureEnd=507903", "507903"), ("TASK_QUEUE_ENABLE", "2", "TASK_QUEUE_ENABLE")],
)
def test_a_capture_that_fails_leaves_plain_calls_and_says_why_unless_it_was_required(
    command: Run, artifact: Path, switch: str, value: str, reason: str
) -> None:
    done = command("verify", artifact, *NPU, "--json", **{switch: value})
    assert done.returncode == 0, done.stdout + done.stderr
    graphs = conditions(json.loads(done.stdout))["graphs"]
    assert [graph["replayed"] for graph in graphs] == [False] * len(graphs)
    assert all(graph["reason"].startswith("capture failed") and reason in graph["reason"] for graph in graphs)
    required = command("verify", artifact, *NPU, "--graph", "on", "--json", **{switch: value})
    assert required.returncode == 4
    assert "cannot be captured" in json.loads(required.stdout)["error"]["what"]


def test_a_torch_npu_without_graphs_leaves_plain_calls_unless_they_are_required(script: Run, artifact: Path) -> None:
    script(
        """
import npu_runtime, torch
del torch.npu.NPUGraph, torch.npu.graph_pool_handle
with npu_runtime.load(sys.argv[1], device="npu:0") as encoder:
    reports = encoder.report().graphs
    assert [report.batch for report in reports] == [1, 2, 4]
    assert all(not report.replayed and "graph_pool_handle" in report.reason for report in reports), reports
try:
    npu_runtime.load(sys.argv[1], device="npu:0", graph=True)
except npu_runtime.UnavailableError as error:
    assert "cannot be captured" in error.what
else:
    raise SystemExit("loaded")
assert torch.npu.conv.allow_hf32 is True
""",
        artifact,
    )


def test_threads_and_batch_sizes_share_graphs_and_every_caller_keeps_its_results(script: Run, artifact: Path) -> None:
    script(
        """
import numpy as np, npu_runtime
from concurrent.futures import ThreadPoolExecutor
images = [np.random.default_rng(seed).standard_normal((1 + seed % 7, 3, 32, 32), np.float32) for seed in range(24)]
with npu_runtime.load(sys.argv[1], device="cpu", backend="torchscript") as cpu:
    expected = [cpu.run(x) for x in images]
with npu_runtime.load(sys.argv[1], device="npu:0", graph=True) as npu, ThreadPoolExecutor(8) as pool:
    kept = list(pool.map(npu.run, images))
    for got, want in zip(kept, expected):
        for name in want:
            assert np.abs(got[name] - want[name]).max() < 1e-5, name
            assert got[name].flags.owndata and got[name].flags.writeable
""",
        artifact,
    )


def test_a_closed_encoder_gives_its_memory_back_and_others_stay_open(script: Run, artifact: Path) -> None:
    script(
        """
import numpy as np, npu_runtime, torch
x = np.ones((3, 3, 32, 32), np.float32)
npu_runtime.load(sys.argv[1], device="npu:0").close()  # what the first start keeps
before = torch.npu.memory_allocated(0)
with npu_runtime.load(sys.argv[1], device="npu:0", graph=True) as first:
    one = torch.npu.memory_allocated(0) - before
    assert one > 4 * 113_600, one
    with npu_runtime.load(sys.argv[1], device="npu:0", graph=False) as second:
        assert torch.npu.memory_allocated(0) > before + one
        kept = second(x)
    assert torch.npu.memory_allocated(0) == before + one
    assert np.array_equal(first(x), kept)
assert torch.npu.memory_allocated(0) == before
try:
    first(x)
except npu_runtime.UsageError as error:
    assert "closed" in error.what
else:
    raise SystemExit("it ran")
""",
        artifact,
    )


def test_a_load_that_fails_leaves_no_memory_and_no_settings_behind(script: Run, artifact: Path) -> None:
    script(
        """
import npu_runtime, torch
torch.ones(1, device="npu:0")
before = torch.npu.memory_allocated(0)
try:
    npu_runtime.load(sys.argv[1], device="npu:0")
except npu_runtime.UnavailableError as error:
    assert error.got == "aten::gelu", error
else:
    raise SystemExit("loaded")
assert torch.npu.memory_allocated(0) <= before
assert torch.npu.conv.allow_hf32 is True
""",
        artifact,
        EMULATED_CANN_FAULTS="no-kernel:aten::gelu",
    )


def test_a_forked_child_is_told_to_spawn(script: Run, artifact: Path) -> None:
    script(
        """
import multiprocessing, numpy as np, npu_runtime, warnings
warnings.simplefilter("ignore")
x = np.ones((1, 3, 32, 32), np.float32)
encoder = npu_runtime.load(sys.argv[1], device="npu:0")
def child(queue):
    try:
        encoder(x)
    except npu_runtime.UsageError as error:
        queue.put(str(error))
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
told = queue.get(timeout=60)
process.join()
assert "forked after npu:0 was started" in told and "spawn" in told, told
encoder(x)
""",
        artifact,
    )


def test_devices_that_are_not_there_are_told_apart(command: Run, artifact: Path, tmp_path: Path) -> None:
    beyond = command("verify", artifact, "--device", "npu:7", "--json")
    assert (beyond.returncode, json.loads(beyond.stdout)["error"]["expected"]) == (4, "npu:0, npu:1")
    none = command("verify", artifact, *NPU, "--json", ASCEND_RT_VISIBLE_DEVICES="")
    assert (none.returncode, json.loads(none.stdout)["error"]["got"]) == (4, "0 devices, ASCEND_RT_VISIBLE_DEVICES=")
    other_release = tmp_path / "torch_npu-2.1.0.dist-info" / "METADATA"
    other_release.parent.mkdir()
    other_release.write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.1.0\n", "utf-8")
    other = command("verify", artifact, *NPU, "--json", PYTHONPATH=tmp_path)
    assert (other.returncode, "belongs to another torch" in other.stdout) == (4, True)


def test_callers_share_the_npu_and_transfers_are_told_apart_in_a_table(command: Run, artifact: Path) -> None:
    arguments = ("--iterations", "3", "--warmup", "1", "--batch", "1", "--callers", "3", "--seconds", "0.2")
    done = command("bench", artifact, *NPU, "--backend", "torchscript", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stages of a call in ms, on the clock of npu:0, medians of 3 rounds\n" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    place = lines.index(["backend", "batch", "transfer", "in", "compute", "transfer", "out"])
    backend, batch, *stages = lines[place + 1]
    assert (backend, batch, len([float(ms) for ms in stages])) == ("torchscript", "1", 3)
    assert any(line[:3] == ["torchscript", "1", "3"] for line in lines[place + 2 :])


def test_bench_and_embed_run_on_the_npu_and_record_the_conditions(command: Run, artifact: Path, tmp_path: Path) -> None:
    done = command("bench", artifact, *NPU, "--iterations", "2", "--warmup", "1", "--batch", "1", "--cold", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert {row["backend"] for row in record["rows"]} == {"eager", "torchscript"}
    assert {report["numerics"]["numerics"] for report in record["conditions"].values()} == {"strict"}
    assert record["accelerator"]["name"].startswith("Ascend")
    cold = next(start for start in record["cold"] if start["backend"] == "torchscript")
    assert cold["host_peak_nbytes"] > cold["device_peak_nbytes"] > 0
    assert record["environment"]["variables"]["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1"
    for row in record["rows"]:
        stages = row["stages"]
        assert len(stages["samples"]) == 2
        for stage in ("transfer_in_ms", "compute_ms", "transfer_out_ms"):
            assert stages[stage] == pytest.approx(sum(times[stage] for times in stages["samples"]) / 2)
            assert min(times[stage] for times in stages["samples"]) >= 0
        assert stages["compute_ms"] > 0
    Image.new("RGB", (40, 30), (200, 10, 60)).save(tmp_path / "a.png")
    output = tmp_path / "features.npy"
    done = command("embed", artifact, tmp_path / "a.png", *NPU, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "numerics  torchscript: strict (npu.conv.allow_hf32 False" in done.stdout
    assert output.is_file()


@pytest.fixture(scope="session")
def artifact_of_pixels(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`artifact` with programs that take uint8 and normalise. Not to be changed."""
    output = tmp_path_factory.mktemp("npu-pixels") / "tiny-vit"
    how = {"formats": ("torchscript",), "batch": (1, 2, 4)}
    return export("tiny-vit", weights="random:3", input="uint8", output=output, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_pixels_of_every_family_are_normalised_on_the_device_and_nothing_runs_on_the_cpu(
    encoder: EncoderSpec, command: Run, tmp_path: Path, photographs: Path
) -> None:
    output = export(encoder.name, weights="random:3", formats=("torchscript",), input="uint8", output=tmp_path / "u8")
    log = tmp_path / "log"
    arguments = ("--seeds", "42", "--images", photographs, "--graph", "on", "--json")
    done = command("parity", output, *NPU, *arguments, EMULATED_CANN_LOG=log)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(backend, device) for backend, device, _ in steps_of(done)] == [
        ("eager", "cpu"),
        ("torchscript", "cpu"),
        ("eager", "npu:0"),
        ("torchscript", "npu:0"),
    ]
    record = json.loads(done.stdout)
    assert all(o["metrics"]["max_abs_error"] < 1e-5 for step in record["steps"] for o in step["outputs"])
    assert "fall back to run on the CPU" not in done.stderr


def test_the_bytes_of_a_call_that_move_to_the_device_fall_to_a_quarter(
    script: Run, artifact: Path, artifact_of_pixels: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    script(
        """
import numpy as np, npu_runtime
from npu_runtime.artifact.random_images import draw_images
log, *paths = sys.argv[1:]
for graph in (True, False):
    for path in paths:
        with npu_runtime.load(path, device="npu:0", graph=graph) as encoder:
            images = draw_images(np.random.default_rng(0), encoder.manifest.inputs[0].of_batch(7), encoder.manifest.inputs[0].dtype)
            with open(log, "a") as file:
                file.write("call\\n")
            encoder(images)
            with open(log, "a") as file:
                file.write("done\\n")
""",  # noqa: E501
        log,
        artifact,
        artifact_of_pixels,
        EMULATED_CANN_LOG=log,
    )
    calls = re.findall(r"^call\n(.*?)^done$", log.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    moved = [sum(map(int, re.findall(r"^copied host_to_device (\d+)$", call, re.MULTILINE))) for call in calls]
    whole = 7 * 3 * 32 * 32  # as 4, 2 and 1
    assert moved == [4 * whole, whole] * 2


def test_what_measures_calls_on_the_npu_gives_programs_of_pixels_bytes(command: Run, artifact_of_pixels: Path) -> None:
    arguments = ("--iterations", "2", "--warmup", "1", "--batch", "1", "--callers", "2", "--seconds", "0.2", "--cold")
    done = command("bench", artifact_of_pixels, *NPU, *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert {row["backend"] for row in record["rows"]} == {"eager", "torchscript"}
    assert all(len(row["stages"]["samples"]) == 2 for row in record["rows"])
    assert [start["backend"] for start in record["cold"]] == ["torchscript"]  # eager is not known in a fresh process
    assert (record["not_run"], len(record["throughput"])) == ({}, 2)
