"""npu-runtime bench."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from watching import ended_steps

from npu_runtime.artifact.store import open_artifact
from npu_runtime.bench.record_files import decode_record, read_record
from npu_runtime.cli.bench_tables import print_bench
from npu_runtime.devices import cpu_count
from npu_runtime.encoder import Encoder

ROUNDS = ("--iterations", "3", "--warmup", "1")


def test_json_holds_the_statistics_and_the_samples_of_every_backend_and_batch(
    call: Callable[..., Any], tiny_artifact: Path
) -> None:
    record = call("npu-runtime", "bench", tiny_artifact, "--iterations", "20", "--warmup", "1", "--json").json
    assert [(row["backend"], row["batch"]) for row in record["rows"]] == [
        (backend, batch) for batch in (1, 4) for backend in ("eager", "torchscript", "onnxruntime")
    ]
    assert record["not_run"] == {}
    assert record["digest"] == open_artifact(tiny_artifact).digest
    assert (record["threads"], record["warmup"], record["device"]) == (cpu_count(), 1, "cpu")
    assert record["environment"]["cores_usable"] == cpu_count()
    for row in record["rows"]:
        samples, latency = np.array(row["samples_ms"]), row["latency"]
        assert latency["samples"] == len(samples) == 20
        assert latency["minimum_ms"] == samples.min() > 0
        assert latency["maximum_ms"] == samples.max()
        assert latency["median_ms"] == latency["p50_ms"] == pytest.approx(np.median(samples))
        assert latency["p90_ms"] == pytest.approx(np.percentile(samples, 90))
        assert (latency["p95_ms"], latency["p99_ms"]) == (None, None)
        assert latency["standard_deviation_ms"] == pytest.approx(samples.std(ddof=1))
        assert latency["images_per_second"] == pytest.approx(1000 * row["batch"] / latency["median_ms"])
    samples_of = {(row["backend"], row["batch"]): np.array(row["samples_ms"]) for row in record["rows"]}
    for row in record["rows"]:
        if row["backend"] == "eager":
            assert row["over_eager"] is None
            continue
        ratios = np.sort(samples_of["eager", row["batch"]] / samples_of[row["backend"], row["batch"]])
        over_eager = row["over_eager"]
        assert over_eager["speedup"] == pytest.approx(np.median(ratios))
        assert over_eager["interval"] == pytest.approx({"low": ratios[5], "high": ratios[14]})
        assert over_eager["verdict"] in ("faster", "slower", "same", "undecided")


@pytest.mark.parametrize(("iterations", "p90", "p99"), [(19, False, False), (100, True, True)])
def test_a_percentile_is_given_from_enough_samples_only(
    iterations: int, p90: bool, p99: bool, call: Callable[..., Any], tiny_artifact: Path
) -> None:
    arguments = ("--backend", "onnx", "--batch", "1", "--iterations", str(iterations), "--json")
    (row,) = call("npu-runtime", "bench", tiny_artifact, *arguments).json["rows"]
    latency = row["latency"]
    assert (latency["p90_ms"] is not None, latency["p99_ms"] is not None) == (p90, p99)
    assert latency["p50_ms"] is not None


def test_the_table_has_a_row_for_each_backend_and_batch_and_a_dash_where_nothing_was_measured(
    call: Callable[..., Any], tiny_artifact: Path
) -> None:
    result = call("npu-runtime", "bench", tiny_artifact, *ROUNDS, "--batch", "4", "--threads", "1")
    assert result.code == 0
    assert result.out.startswith("weights   ")
    assert "in ms, 3 rounds, 1 threads, on cpu" in result.out
    rows = [line.split() for line in result.out.splitlines()[3:] if not line.startswith(("numerics", "noisy"))]
    assert [row[:2] for row in rows] == [["eager", "4"], ["torchscript", "4"], ["onnxruntime", "4"]]
    assert all(row[4:7] == ["-"] * 3 for row in rows)
    assert [row[-1] for row in rows] == ["-", "undecided", "undecided"]
    assert [line.split("  ")[0] for line in ended_steps(result.err) if line] == [
        "✓ open eager",
        "✓ open torchscript",
        "✓ open onnxruntime",
        "✓ measure",
    ]


def test_a_batch_that_is_not_frozen_is_wrong_usage(call: Callable[..., Any], tiny_artifact: Path) -> None:
    result = call("npu-runtime", "bench", tiny_artifact, "--batch", "1,8", "--json")
    assert result.code == 2
    assert result.json["error"]["what"] == "the artifact was not frozen for this batch size"
    assert result.json["error"]["expected"] == "1, 4"


@pytest.fixture
def moved(artifact_copy: Path, rewrite: Callable[..., None], tmp_path: Path) -> Path:
    """An artifact whose recorded checkpoint is no longer where it was."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["provenance"]["weights"]["source"] = str(tmp_path / "gone")

    rewrite(artifact_copy, change)
    return artifact_copy


def test_a_checkpoint_that_is_gone_leaves_eager_out_with_the_reason(call: Callable[..., Any], moved: Path) -> None:
    result = call("npu-runtime", "bench", moved, *ROUNDS, "--json")
    assert result.code == 0
    assert {row["backend"] for row in result.json["rows"]} == {"torchscript", "onnxruntime"}
    assert all(row["over_eager"] is None for row in result.json["rows"])
    assert "there is no such checkpoint" in result.json["not_run"]["eager"]
    text = call("npu-runtime", "bench", moved, *ROUNDS)
    assert "not run   eager: the checkpoint that the manifest records cannot be used" in text.out


def test_eager_that_was_named_and_cannot_run_is_an_error(call: Callable[..., Any], moved: Path) -> None:
    result = call("npu-runtime", "bench", moved, *ROUNDS, "--backend", "eager", "--backend", "onnx", "--json")
    assert result.code == 1
    assert result.json["error"]["next"] == "say where it lies now with --weights"


def test_a_checkpoint_that_moved_is_used_where_it_lies_now(
    call: Callable[..., Any], moved: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    there = shutil.copytree(tiny_checkpoint, tmp_path / "there")
    record = call("npu-runtime", "bench", moved, *ROUNDS, "--weights", there, "--json").json
    assert {row["backend"] for row in record["rows"]} == {"eager", "torchscript", "onnxruntime"}


def test_other_weights_of_the_same_shapes_are_refused(
    call: Callable[..., Any], tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    tensors["vit.layernorm.bias"][0] += 1e-6
    save_file(tensors, tmp_path / "other.safetensors")
    result = call("npu-runtime", "bench", tiny_artifact, *ROUNDS, "--weights", tmp_path / "other.safetensors", "--json")
    assert result.code == 1
    error = result.json["error"]
    assert error["what"] == "these are not the weights that the artifact was exported from"
    assert error["where"] == str(tmp_path / "other.safetensors")
    assert error["expected"].endswith(open_artifact(tiny_artifact).manifest.provenance.weights.state_sha256)


def test_weights_without_eager_are_refused(call: Callable[..., Any], tiny_artifact: Path) -> None:
    result = call("npu-runtime", "bench", tiny_artifact, "--backend", "onnx", "--weights", "x", "--json")
    assert (result.code, result.json["error"]["what"]) == (2, "--weights is for eager, which is not among the backends")


def test_a_damaged_program_is_an_error_and_not_left_out(call: Callable[..., Any], artifact_copy: Path) -> None:
    (artifact_copy / "model.ts").write_bytes(b"")
    result = call("npu-runtime", "bench", artifact_copy, *ROUNDS, "--json")
    assert (result.code, result.json["error"]["what"]) == (1, "a file of the artifact has another size")


def test_the_record_and_the_samples_go_to_files_which_are_not_replaced_unasked(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    record, samples = tmp_path / "r.json", tmp_path / "s.csv"
    arguments = ("npu-runtime", "bench", tiny_artifact, *ROUNDS, "--batch", "1", "--record", record, "--csv", samples)
    result = call(*arguments, "--json")
    assert (result.code, record.read_text("utf-8")) == (0, result.out)
    read = read_record(record)
    assert read.conditions.keys() == {"eager", "torchscript", "onnxruntime"}
    assert (read.warmup, read.iterations, read.adaptive, read.accelerator) == (1, 3, False, None)
    lines = list(csv.reader(samples.read_text("utf-8").splitlines()))
    assert lines[0] == ["backend", "batch", "round", "latency_ms"]
    assert [(name, int(batch), int(index), float(ms)) for name, batch, index, ms in lines[1:]] == [
        (row.backend, row.batch, index, ms) for row in read.rows for index, ms in enumerate(row.samples_ms)
    ]
    before = record.read_bytes()
    for taken in (("--record", record), ("--csv", samples)):
        again = call("npu-runtime", "bench", tiny_artifact, *ROUNDS, *taken)
        assert (again.code, "the output exists" in again.err) == (2, True)
    assert record.read_bytes() == before
    assert call(*arguments, "--force").code == 0
    assert record.read_bytes() != before


def test_record_and_csv_in_one_file_are_refused(call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path) -> None:
    files = ("--record", tmp_path / "x", "--csv", tmp_path / "x")
    result = call("npu-runtime", "bench", tiny_artifact, *ROUNDS, *files)
    assert (result.code, "name one file" in result.err) == (2, True)


def test_a_run_stands_beside_an_older_one_of_the_same_conditions_with_a_verdict(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    arguments = ("npu-runtime", "bench", tiny_artifact, "--backend", "onnx", "--batch", "1", "--iterations", "8")
    old = tmp_path / "old.json"
    assert call(*arguments, "--record", old).code == 0
    result = call(*arguments, "--against", old, "--json")
    assert result.code == 0
    against = result.json["against"]
    assert (against["old"], against["refused"]) == (str(old), [])
    (row,) = against["rows"]
    assert row["old_median_ms"] == read_record(old).rows[0].latency.median_ms
    assert row["new_median_ms"] == result.json["rows"][0]["latency"]["median_ms"]
    assert row["comparison"]["speedup"] == pytest.approx(row["old_median_ms"] / row["new_median_ms"])
    assert decode_record(result.out, "stdout").rows[0].samples_ms == tuple(result.json["rows"][0]["samples_ms"])
    text = call(*arguments, "--against", old).out
    assert f"medians in ms against {old}" in text
    assert "not judged" not in text


def test_a_record_of_another_machine_or_setting_is_shown_and_not_judged(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    arguments = ("npu-runtime", "bench", tiny_artifact, "--backend", "onnx", "--iterations", "8")
    old = tmp_path / "old.json"
    assert call(*arguments, "--batch", "1,4", "--record", old).code == 0
    document = json.loads(old.read_text("utf-8"))
    document["environment"]["host"] = "elsewhere"
    old.write_text(json.dumps(document), "utf-8")
    result = call(*arguments, "--batch", "1", "--threads", "1", "--against", old)
    assert result.code == 0
    assert "differs   host: elsewhere and " in result.out
    assert "differs   batch sizes: 1, 4 and 1" in result.out
    rows = [line.split() for line in result.out.splitlines() if line.endswith("not judged")]
    assert [(row[0], row[1], row[3] == "-") for row in rows] == [
        ("onnxruntime", "1", False),
        ("onnxruntime", "4", True),
    ]


def test_what_is_no_record_is_refused_before_anything_is_measured(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text("{}")
    result = call("npu-runtime", "bench", tiny_artifact, "--against", tmp_path / "old.json", "--json")
    assert (result.code, result.json["error"]["what"]) == (1, "this is no bench record that this version reads")
    assert "open " not in result.err


def test_an_adaptive_run_makes_20_rounds_at_least_and_no_more_than_were_asked_for(
    call: Callable[..., Any], tiny_artifact: Path
) -> None:
    arguments = ("--iterations", "25", "--batch", "1", "--backend", "eager", "--backend", "onnx", "--adaptive")
    record = call("npu-runtime", "bench", tiny_artifact, *arguments, "--json").json
    counts = {len(row["samples_ms"]) for row in record["rows"]}
    assert (record["adaptive"], record["iterations"], len(counts)) == (True, 25, 1)
    assert counts <= set(range(20, 26))


def test_a_cold_start_is_timed_in_a_fresh_process_whose_memory_is_its_own(
    call: Callable[..., Any], tiny_artifact: Path
) -> None:
    ballast = np.ones(100_000_000)  # 800 MB, which Linux would count in the peak of a child
    arguments = ("--backend", "onnx", "--backend", "torchscript", "--cold", "--json")
    result = call("npu-runtime", "bench", tiny_artifact, *ROUNDS, *arguments)
    assert result.code == 0
    assert [(start["backend"], start["batch"]) for start in result.json["cold"]] == [
        ("onnxruntime", 1),
        ("torchscript", 1),
    ]
    for start in result.json["cold"]:
        assert min(start[f"{stage}_ms"] for stage in ("import", "load", "first", "steady")) > 0
        assert start["steady_ms"] < start["load_ms"] + start["first_ms"]
        assert start["device_peak_nbytes"] is None
    onnx = result.json["cold"][0]
    assert 20e6 < onnx["host_peak_nbytes"] < ballast.nbytes
    files = {path.name: path.stat().st_size for path in tiny_artifact.iterdir()}
    assert result.json["file_nbytes"] == {
        "onnxruntime": sum(size for name, size in files.items() if "onnx" in name),
        "torchscript": files["model.ts"],
    }
    assert decode_record(result.out, "stdout").cold[0].backend == "onnxruntime"


def test_a_backend_that_does_not_start_afresh_is_told_with_the_reason(
    call: Callable[..., Any], tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no kernel here')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    arguments = ("--backend", "onnx", "--backend", "torchscript", "--batch", "4", "--cold")
    result = call("npu-runtime", "bench", tiny_artifact, *ROUNDS, *arguments)
    assert result.code == 0
    assert "one start in a fresh process, batch 4, in ms" in result.out
    assert "not run   cold start of onnxruntime: no kernel here" in result.out


LOAD = ("--iterations", "0", "--callers", "1,2", "--seconds", "0.1")


def test_each_backend_is_loaded_by_each_number_of_callers(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    arguments = ("--backend", "onnx", "--backend", "torchscript", *LOAD, "--threads", "1")
    samples = tmp_path / "s.csv"
    result = call("npu-runtime", "bench", tiny_artifact, *arguments, "--csv", samples, "--json")
    assert result.code == 0
    document = result.json
    assert (document["load_seconds"], document["threads"], document["rows"], document["partial"]) == (0.1, 1, [], False)
    assert [(load["backend"], load["batch"], load["callers"]) for load in document["throughput"]] == [
        (backend, batch, callers)
        for batch in (1, 4)
        for backend in ("onnxruntime", "torchscript")
        for callers in (1, 2)
    ]
    for load in document["throughput"]:
        assert load["seconds"] >= 0.1
        assert load["images_per_second"] == pytest.approx(load["batch"] * load["calls"] / load["seconds"])
        assert load["latency"]["p50_ms"] == pytest.approx(np.median(load["samples_ms"]))
        assert load["callers"] * load["seconds"] * 1000 >= 0.2 * sum(load["samples_ms"])
    assert samples.read_text("utf-8") == "backend,batch,round,latency_ms\n"
    assert document["file_nbytes"].keys() == {"onnxruntime", "torchscript"}


def test_a_slow_encoder_does_not_make_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    record = read_record(Path(__file__).parents[1] / "data" / "records" / "bench-1.0.json")
    row = record.rows[0]
    slow = dataclasses.replace(row, latency=dataclasses.replace(row.latency, images_per_second=0.0277))
    print_bench(dataclasses.replace(record, rows=(slow,)))
    assert " 0.03 " in capsys.readouterr().out


def test_the_table_of_a_load_follows_the_table_of_the_rounds(call: Callable[..., Any], tiny_artifact: Path) -> None:
    arguments = ("--backend", "onnx", "--batch", "4", *ROUNDS, *LOAD[2:])
    lines = call("npu-runtime", "bench", tiny_artifact, *arguments).out.splitlines()
    start = next(index for index, line in enumerate(lines) if "under load for 0.1 s each" in line)
    assert any("a call from numpy to numpy in ms, 3 rounds" in line for line in lines[:start])
    assert lines[start + 1].split() == ["backend", "batch", "callers", "calls", "images/s", "p50", "p90", "p95", "p99"]
    assert [line.split()[:3] for line in lines[start + 2 : start + 4]] == [["onnxruntime", "4", n] for n in "12"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--seconds", "2"), "--seconds is for the load of --callers"),
        (("--iterations", "0"), "nothing is to be measured"),
        (("--callers", "0"), "expected numbers from 1 to 1000"),
        (("--callers", "1,100000"), "expected numbers from 1 to 1000"),
        (("--callers", "many"), "expected whole numbers"),
        (("--callers", "1", "--seconds", "nan"), "expected seconds from 0.1"),
        (("--callers", "1", "--seconds", "inf"), "expected seconds from 0.1"),
        (("--callers", "1", "--seconds", "0"), "expected seconds from 0.1"),
        (("--callers", "1", "--seconds", "soon"), "expected seconds from 0.1"),
    ],
)
def test_a_load_that_cannot_be_made_is_wrong_usage(
    arguments: tuple[str, ...], told: str, call: Callable[..., Any], tiny_artifact: Path
) -> None:
    result = call("npu-runtime", "bench", tiny_artifact, *arguments)
    assert (result.code, told in result.err, result.out) == (2, True, "")


def test_an_output_that_is_not_finite_ends_a_load_with_the_error(
    call: Callable[..., Any], tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    real = Encoder.__call__

    def run(self: Encoder, pixel_values: Any) -> Any:
        return real(self, pixel_values * np.float32("nan") if next(calls) == 20 else pixel_values)

    monkeypatch.setattr(Encoder, "__call__", run)
    result = call("npu-runtime", "bench", tiny_artifact, "--backend", "onnx", *LOAD[:3], "2", "--json")
    assert (result.code, result.json["error"]["what"]) == (1, "the output embedding holds NaN or infinity")


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C in the course of the call of an encoder that has this number."""

    def at(number: int) -> None:
        calls = itertools.count()
        real = Encoder.__call__

        def run(self: Encoder, pixel_values: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, pixel_values)

        monkeypatch.setattr("npu_runtime.cli.console._interrupted", threading.Event())
        monkeypatch.setattr(Encoder, "__call__", run)

    return at


def test_ctrl_c_keeps_whole_rounds_and_marks_them_partial(
    call: Callable[..., Any], interrupt: Callable[[int], None], tiny_artifact: Path, tmp_path: Path
) -> None:
    record, old = tmp_path / "r.json", tmp_path / "old.json"
    arguments = ("--backend", "onnx", "--backend", "torchscript", "--warmup", "2", "--iterations", "30", "--cold")
    interrupt(2 * (2 + 30) + 2 * (2 + 8) + 1)  # in the ninth round of the second batch size
    result = call("npu-runtime", "bench", tiny_artifact, *arguments, "--record", old, "--json")
    assert (result.code, old.read_text("utf-8")) == (130, result.out)
    kept = read_record(old)
    assert (kept.partial, kept.cold, kept.cold_not_run) == (True, (), {})
    assert [(row.backend, row.batch, len(row.samples_ms)) for row in kept.rows] == [
        ("onnxruntime", 1, 30),
        ("torchscript", 1, 30),
        ("onnxruntime", 4, 8),
        ("torchscript", 4, 8),
    ]
    interrupt(2 * (2 + 30) + 2 * (2 + 5))
    result = call("npu-runtime", "bench", tiny_artifact, *arguments, "--record", record, "--against", old)
    assert result.code == 130
    assert "partial   the run was interrupted" in result.out
    assert "partial   the old run was interrupted\npartial   the new run was interrupted\n" in result.out
    assert "not judged" not in result.out
    assert "in ms, 5 and 30 rounds" in call("npu-runtime", "show", record).out


def test_ctrl_c_under_load_keeps_the_rounds_and_no_part_of_a_slice(
    call: Callable[..., Any], interrupt: Callable[[int], None], tiny_artifact: Path
) -> None:
    interrupt(2000)
    arguments = ("--backend", "onnx", "--batch", "1", *ROUNDS, "--callers", "1,2", "--seconds", "600")
    result = call("npu-runtime", "bench", tiny_artifact, *arguments, "--json")
    assert result.code == 130
    assert (result.json["partial"], result.json["throughput"], result.json["load_seconds"]) == (True, [], 600)
    assert [len(row["samples_ms"]) for row in result.json["rows"]] == [3]


def test_ctrl_c_before_anything_was_measured_writes_no_record(
    call: Callable[..., Any], interrupt: Callable[[int], None], tiny_artifact: Path, tmp_path: Path
) -> None:
    interrupt(1)
    arguments = ("--backend", "onnx", "--warmup", "5", "--record", tmp_path / "r.json")
    result = call("npu-runtime", "bench", tiny_artifact, *arguments)
    assert (result.code, result.out, list(tmp_path.iterdir())) == (130, "", [])
    assert result.err.endswith("interrupted\n")


def test_show_prints_what_bench_printed_and_compares_as_it_does(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    one, other, parity = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "p.json"
    arguments = ("--backend", "onnx", "--batch", "1", "--iterations", "8", *LOAD[2:])
    printed = call("npu-runtime", "bench", tiny_artifact, *arguments, "--record", one)
    against = call("npu-runtime", "bench", tiny_artifact, *arguments, "--record", other, "--against", one)
    shown = call("npu-runtime", "show", one)
    assert (shown.code, shown.out.splitlines()[1:]) == (0, printed.out.splitlines())
    assert re.match(r"made on   .*, device cpu, python [\d.]+, .*numpy [\d.]+$", shown.out.splitlines()[0])
    compared = call("npu-runtime", "show", other, "--against", one)
    assert (compared.code, compared.out.splitlines()[1:]) == (0, against.out.splitlines())
    assert "under load, against " in compared.out
    parity.write_text(call("npu-runtime", "verify", tiny_artifact, "--backend", "onnx", "--json").out, "utf-8")
    for first, second in ((one, parity), (parity, one)):
        mixed = call("npu-runtime", "show", first, "--against", second)
        assert (mixed.code, "records of two kinds" in mixed.err, mixed.out) == (2, True, "")
    old = call("npu-runtime", "show", Path(__file__).parents[1] / "data" / "records" / "bench-1.0.json")
    assert (old.code, "tiny-vit, a call from numpy to numpy in ms, 8 rounds" in old.out) == (0, True)


@pytest.mark.parametrize("text", ["[]", "{}", '{"record": "colour"}', '{"record": 3}', "no JSON"])
def test_show_refuses_what_is_no_record(text: str, call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    result = call("npu-runtime", "show", tmp_path / "r.json")
    assert (result.code, result.out) == (1, "")
    assert "not JSON" in result.err if text == "no JSON" else '"record": "parity" or "record": "bench"' in result.err


def test_a_noisy_row_is_shown_and_labelled(
    call: Callable[..., Any], tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npu_runtime.bench.statistics.NOISY", 0.0)
    result = call("npu-runtime", "bench", tiny_artifact, *ROUNDS, "--backend", "onnx", "--batch", "1")
    (line,) = [line for line in result.out.splitlines() if line.startswith("noisy")]
    assert line.startswith("noisy     onnxruntime batch 1 (")
    assert " %): interquartile range above " in line
    assert "\nonnxruntime" in result.out
