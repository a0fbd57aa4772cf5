from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npu_runtime import Error
from npu_runtime.artifact.store import open_artifact
from npu_runtime.backends.base import GraphReport, SessionReport, StageTimes
from npu_runtime.bench.against import compare_records, differences
from npu_runtime.bench.record_files import (
    SCHEMA_MAJOR,
    SCHEMA_MINOR,
    decode_record,
    encode_csv,
    encode_record,
    read_record,
)
from npu_runtime.bench.records import BenchRecord, Stages, make_record
from npu_runtime.bench.statistics import summarise_latency
from npu_runtime.bench.throughput import Load
from npu_runtime.devices import CPU
from npu_runtime.environment import VARIABLES, AcceleratorRecord, describe_accelerator, describe_environment

BACKENDS = ("eager", "torchscript", "onnxruntime")
RECORDS = Path(__file__).parents[1] / "data" / "records"


@pytest.fixture(scope="module")
def record(tiny_artifact: Path) -> BenchRecord:
    """Seeded latencies of three backends at two batch sizes: eager's are twice those of the others."""
    generator = np.random.default_rng(0)
    samples = {
        (backend, batch): (batch * generator.uniform(10, 11, 30) * (1 + (backend == "eager"))).tolist()
        for batch in (1, 4)
        for backend in BACKENDS
    }
    return make_record(
        open_artifact(tiny_artifact),
        samples,
        environment=describe_environment(),
        device="cpu",
        accelerator=None,
        conditions={backend: SessionReport({"numerics": "strict"}) for backend in BACKENDS},
        threads=2,
        numerics="strict",
        graph="auto",
        allow_fallback=False,
        warmup=3,
        iterations=30,
        adaptive=False,
        not_run={"other": "it is not installed"},
        seconds=1.5,
        loads={
            (backend, batch, callers): Load(2.5, tuple(generator.uniform(10, 11, 50).tolist()))
            for batch in (1, 4)
            for callers in (1, 8)
            for backend in reversed(BACKENDS)
        },
        load_seconds=2.0,
    )


def with_stages(record: BenchRecord) -> BenchRecord:
    times = tuple(StageTimes(k, 2.0 * k, 3.0 * k) for k in (5.0, 1.0, 2.0))
    rows = tuple(dataclasses.replace(row, stages=Stages(2, 4, 6, times)) for row in record.rows)
    return dataclasses.replace(record, rows=rows)


@pytest.fixture
def document(record: BenchRecord) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(encode_record(record))
    return loaded


def test_decoding_inverts_encoding(record: BenchRecord, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(encode_record(record), "utf-8")
    assert read_record(tmp_path / "r.json") == record
    beside = compare_records(record, record, "r")
    assert decode_record(encode_record(record, beside), "r") == record


def test_an_accelerator_and_its_graphs_survive(record: BenchRecord) -> None:
    report = SessionReport({"numerics": "strict"}, None, ("aten::x",), (GraphReport(1, True, None, 0.0, 1.5),))
    changed = dataclasses.replace(
        record, accelerator=AcceleratorRecord("Ascend910B3", "8.5.0"), graph=True, conditions={"torchscript": report}
    )
    assert decode_record(encode_record(changed), "r") == changed


def test_stages_and_the_mark_of_an_interruption_survive(record: BenchRecord) -> None:
    changed = dataclasses.replace(with_stages(record), partial=True)
    assert decode_record(encode_record(changed), "r") == changed
    medians_alone = dataclasses.replace(changed.rows[0], stages=Stages(1, 2, 3))
    changed = dataclasses.replace(changed, rows=(medians_alone, *changed.rows[1:]))
    assert decode_record(encode_record(changed), "r") == changed


def test_stages_are_the_medians_of_their_rounds(tiny_artifact: Path) -> None:
    times = [StageTimes(1, 10, 3), StageTimes(3, 30, 1), StageTimes(2, 50, 2)]
    made = remake(tiny_artifact, {("eager", 1): [1.0], ("onnxruntime", 1): [1.0]}, stages={("eager", 1): times})
    assert [row.stages for row in made.rows] == [Stages(2, 30, 2, tuple(times)), None]


def remake(artifact: Path, samples: dict[tuple[str, int], list[float]], **changes: Any) -> BenchRecord:
    conditions = {backend: SessionReport({}) for backend in BACKENDS}
    return make_record(
        open_artifact(artifact), samples, environment={}, device="cpu", accelerator=None, conditions=conditions,
        threads=1, numerics="strict", graph="auto", allow_fallback=False, warmup=1, iterations=1, adaptive=False,
        not_run={}, seconds=1.0, **changes,
    )  # fmt: skip


def test_what_has_no_sample_has_no_row(tiny_artifact: Path) -> None:
    samples = {("eager", 1): [2.0], ("onnxruntime", 1): [1.0], ("eager", 4): [], ("onnxruntime", 4): []}
    made = remake(tiny_artifact, samples, partial=True)
    assert [(row.backend, row.batch) for row in made.rows] == [("eager", 1), ("onnxruntime", 1)]
    assert decode_record(encode_record(made), "r") == made


def test_loads_hold_the_rate_and_the_statistics_of_their_calls(record: BenchRecord) -> None:
    assert [(load.backend, load.batch, load.callers) for load in record.throughput] == [
        (backend, batch, callers) for batch in (1, 4) for backend in BACKENDS for callers in (1, 8)
    ]
    for load in record.throughput:
        assert load.latency == summarise_latency(load.samples_ms, load.batch)
        assert (load.calls, load.seconds) == (50, 2.5)
        assert load.images_per_second == 20 * load.batch
    assert dataclasses.replace(record, rows=()).batches == (1, 4)


def test_rows_hold_the_statistics_and_the_comparison_of_their_samples(record: BenchRecord) -> None:
    assert [(row.backend, row.batch) for row in record.rows] == [(name, batch) for batch in (1, 4) for name in BACKENDS]
    assert record.batches == (1, 4)
    for row in record.rows:
        assert row.latency == summarise_latency(row.samples_ms, row.batch)
        assert (row.over_eager is None) == (row.backend == "eager")
        if row.over_eager is not None:
            assert row.over_eager.verdict == "faster"
            assert row.over_eager.speedup == pytest.approx(2, abs=0.1)


def test_the_csv_holds_every_sample_with_all_of_its_digits(record: BenchRecord) -> None:
    header, *lines = [line.split(",") for line in encode_csv(record).splitlines()]
    assert header == ["backend", "batch", "round", "latency_ms"]
    assert [(name, int(batch), int(index), float(value)) for name, batch, index, value in lines] == [
        (row.backend, row.batch, index, value) for row in record.rows for index, value in enumerate(row.samples_ms)
    ]


def test_a_record_of_a_newer_minor_is_read_and_of_a_newer_major_refused(
    document: dict[str, Any], record: BenchRecord
) -> None:
    newer = {**document, "schema": f"{SCHEMA_MAJOR}.{SCHEMA_MINOR + 1}", "colour": "blue"}
    assert decode_record(json.dumps(newer), "r") == record
    with pytest.raises(Error, match="no bench record that this version reads") as refused:
        decode_record(json.dumps({**document, "schema": f"{SCHEMA_MAJOR + 1}.0"}), "r")
    assert refused.value.got == f"schema {SCHEMA_MAJOR + 1}.0"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"record": "parity", "schema": "1.0"}', '{"record": "bench", "schema": 1.0}', "{" * 100_000],
)
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(Error, match=r"not JSON|no bench record"):
        decode_record(text, "r")


def test_a_record_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b"\xff\xfe")
    with pytest.raises(Error, match="no text"):
        read_record(tmp_path / "r.json")


def test_a_record_of_schema_1_0_is_read_as_one_without_what_came_later() -> None:
    old = read_record(RECORDS / "bench-1.0.json")
    assert [(row.backend, len(row.samples_ms)) for row in old.rows] == [(name, 8) for name in BACKENDS]
    assert all(row.stages is None for row in old.rows)
    assert (old.throughput, old.load_seconds, old.partial) == ((), None, False)
    assert [start.backend for start in old.cold] == ["torchscript", "onnxruntime"]


def test_a_record_of_schema_1_1_is_read_with_the_fallback_and_the_operators_that_it_tells() -> None:
    report = read_record(RECORDS / "bench-1.1.json").conditions["torchscript"]
    assert report.fallback == ()
    arithmetic = report.arithmetic
    assert arithmetic is not None
    assert set(arithmetic.errors()) == {"matmul", "conv", "gelu"}
    assert arithmetic.dtypes == {}


def test_a_fallback_that_is_unknown_survives_and_is_not_taken_for_none(record: BenchRecord) -> None:
    unknown = dataclasses.replace(record, conditions={"onnxruntime": SessionReport({}, fallback=None)})
    none = dataclasses.replace(record, conditions={"onnxruntime": SessionReport({}, fallback=())})
    assert decode_record(encode_record(unknown), "r") == unknown
    assert "fallback of onnxruntime: none and unknown" in differences(none, unknown)


def delete(document: dict[str, Any]) -> object:
    return document.pop("rows")


@pytest.mark.parametrize(
    "damage",
    [
        delete,
        lambda d: d.update(threads="2"),
        lambda d: d.update(colour="blue"),
        lambda d: d.update(numerics="loose"),
        lambda d: d["rows"][0].update(batch=1.5),
        lambda d: d["rows"][0]["latency"].pop("p95_ms"),
        lambda d: d["rows"][1]["over_eager"].update(verdict="best"),
        lambda d: d["rows"][0].update(samples_ms=[]),
        lambda d: d["rows"][0]["samples_ms"].pop(),
        lambda d: d["rows"][0]["samples_ms"].__setitem__(0, "nan"),
        lambda d: d["rows"][0]["samples_ms"].__setitem__(0, 0.0),
        lambda d: d["rows"][0]["samples_ms"].__setitem__(0, -1.0),
        lambda d: d["rows"][0]["latency"].update(median_ms=1.0),
        lambda d: d["rows"][1].update(backend="eager"),
        lambda d: d["rows"][0].update(stages={"transfer_in_ms": 1.0}),
        lambda d: d["rows"][0].update(stages=staged(2.0)),
        lambda d: d["throughput"][0].update(samples_ms=[]),
        lambda d: d["throughput"][0].update(calls=49),
        lambda d: d["throughput"][0].update(seconds=0.0),
        lambda d: d["throughput"][0].update(seconds="inf"),
        lambda d: d["throughput"][0].update(images_per_second=21.0),
        lambda d: d["throughput"][0]["latency"].update(median_ms=1.0),
        lambda d: d["throughput"][0]["samples_ms"].__setitem__(0, -1.0),
        lambda d: d["throughput"][1].update(callers=1),
        lambda d: d.update(partial="no"),
    ],
)
def test_a_damaged_record_is_refused_with_the_place(
    document: dict[str, Any], damage: Callable[[dict[str, Any]], object]
) -> None:
    damage(document)
    with pytest.raises(Error, match=r"the record has (a )?wrong"):
        decode_record(json.dumps(document), "r")


def staged(compute_ms: float) -> dict[str, Any]:
    """Stages with the samples of a compute of 1 ms."""
    sample = {"transfer_in_ms": 1.0, "compute_ms": 1.0, "transfer_out_ms": 1.0}
    return {**sample, "compute_ms": compute_ms, "samples": [sample]}


def test_stages_that_are_those_of_their_samples_are_read(document: dict[str, Any]) -> None:
    document["rows"][0].update(stages=staged(1.0))
    stages = decode_record(json.dumps(document), "r").rows[0].stages
    assert stages is not None
    assert stages.compute_ms == 1


def with_environment(record: BenchRecord, **changes: object) -> BenchRecord:
    return dataclasses.replace(record, environment={**record.environment, **changes})


def test_records_of_the_same_conditions_are_judged_row_by_row(record: BenchRecord) -> None:
    rows = tuple(
        dataclasses.replace(row, samples_ms=tuple(3 * ms for ms in row.samples_ms)) if row.batch == 4 else row
        for row in record.rows
    )
    rows = tuple(dataclasses.replace(r, latency=summarise_latency(r.samples_ms, r.batch)) for r in rows)
    new = with_environment(dataclasses.replace(record, rows=rows, iterations=40, warmup=9), load_average_1min=9.0)
    against = compare_records(record, new, "old.json")
    assert (against.old, against.refused) == ("old.json", ())
    for row in against.rows:
        assert row.comparison is not None
        assert row.comparison.speedup == pytest.approx(1 if row.batch == 1 else 1 / 3)
        # An interval of two runs is wider than the spread of either of them.
        assert row.comparison.verdict in (("same", "undecided") if row.batch == 1 else ("slower",))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: with_environment(r, host="elsewhere"), "host: "),
        (lambda r: with_environment(r, processor="Kunpeng 920"), "processor: "),
        (lambda r: with_environment(r, machine="aarch64"), "machine: "),
        (lambda r: with_environment(r, cores_usable=640), "cores usable: "),
        (lambda r: with_environment(r, versions={"torch": "0.1"}), "version of torch: "),
        (lambda r: with_environment(r, variables={"OMP_NUM_THREADS": "7"}), "OMP_NUM_THREADS: none and 7"),
        (lambda r: with_environment(r, versions="edited"), "version of torch: "),
        (lambda r: dataclasses.replace(r, digest="0" * 64), "artifact: "),
        (lambda r: dataclasses.replace(r, device="npu:0"), "device: cpu and npu:0"),
        (lambda r: dataclasses.replace(r, accelerator=AcceleratorRecord("X", "8.5")), "accelerator: none and X, 8.5"),
        (lambda r: dataclasses.replace(r, threads=1), "threads: 2 and 1"),
        (lambda r: dataclasses.replace(r, numerics="fast"), "numerics: strict and fast"),
        (lambda r: dataclasses.replace(r, graph=False), "graph: auto and False"),
        (lambda r: dataclasses.replace(r, allow_fallback=True), "allow fallback: False and True"),
        (lambda r: dataclasses.replace(r, rows=r.rows[:3], throughput=()), "batch sizes: 1, 4 and 1"),
        (
            lambda r: dataclasses.replace(r, conditions={**r.conditions, "eager": SessionReport({"numerics": "x"})}),
            "numerics of eager: strict and x",
        ),
        (
            lambda r: dataclasses.replace(
                r,
                conditions={
                    **r.conditions,
                    "eager": SessionReport({"numerics": "strict"}, graphs=(GraphReport(1, True, None, 0.0, 2.0),)),
                },
            ),
            "graph replay of batch 1 of eager: none and True",
        ),
        (
            lambda r: dataclasses.replace(r, conditions={"eager": r.conditions["eager"]}),
            "backends: eager, torchscript, onnxruntime and eager",
        ),
    ],
)
def test_records_of_other_conditions_are_shown_and_not_judged(
    record: BenchRecord, change: Callable[[BenchRecord], BenchRecord], told: str
) -> None:
    against = compare_records(record, change(record), "old.json")
    assert any(text.startswith(told) for text in against.refused)
    assert all(row.comparison is None for row in against.rows)
    assert all(row.old_median_ms is not None for row in against.rows)
    assert differences(record, record) == ()


def test_a_row_of_one_record_alone_has_no_median_of_the_other(record: BenchRecord) -> None:
    fewer = dataclasses.replace(record, rows=record.rows[:3])
    assert [row.new_median_ms is None for row in compare_records(record, fewer, "r").rows] == [False] * 3 + [True] * 3
    assert [row.old_median_ms is None for row in compare_records(fewer, record, "r").rows] == [False] * 3 + [True] * 3


def test_loads_of_both_records_stand_beside_each_other_and_interrupted_runs_are_told(record: BenchRecord) -> None:
    doubled = tuple(
        dataclasses.replace(load, seconds=2 * load.seconds, images_per_second=load.images_per_second / 2)
        for load in record.throughput
        if load.callers == 8
    )
    new = dataclasses.replace(record, throughput=doubled, load_seconds=5.0, partial=True)
    against = compare_records(record, new, "old.json")
    assert (against.refused, against.partial) == ((), ("new",))
    assert [(load.backend, load.batch, load.callers) for load in against.throughput] == [
        (backend, batch, 8) for batch in (1, 4) for backend in BACKENDS
    ]
    for load in against.throughput:
        assert load.old_images_per_second == 2 * load.new_images_per_second == 20 * load.batch
        assert load.old_p50_ms == load.new_p50_ms
    assert compare_records(new, record, "r").partial == ("old",)
    assert compare_records(record, dataclasses.replace(record, throughput=()), "r").throughput == ()


def test_what_a_machine_is_and_how_it_is_set_stands_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = describe_environment()
    assert environment["host"] == os.uname().nodename
    assert environment["variables"] == {"OMP_NUM_THREADS": "3"}
    load = environment["load_average_1min"]
    assert isinstance(load, float)
    assert 0 <= load < math.inf


def test_the_cpu_is_no_accelerator() -> None:
    assert describe_accelerator(CPU) is None
