from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_runtime import Error
from npu_runtime.artifact.store import open_artifact
from npu_runtime.parity.inputs import Inputs, SkippedInput, seeded_inputs
from npu_runtime.parity.ladder import Ladder, plan_ladder
from npu_runtime.parity.profiles import PROFILES
from npu_runtime.parity.record_files import (
    SCHEMA_MAJOR,
    SCHEMA_MINOR,
    decode_record,
    differences,
    encode_record,
    read_record,
)
from npu_runtime.parity.records import BoundaryError, ParityRecord, make_record


@pytest.fixture(scope="module")
def record(tiny_artifact: Path) -> ParityRecord:
    """A real run on two seeds."""
    artifact = open_artifact(tiny_artifact)
    inputs = Inputs(seeded_inputs((1, 2), artifact.manifest.inputs[0]))
    ladder = Ladder(artifact, inputs, profile=PROFILES["reports"], threads=1)
    ladder.climb(plan_ladder(artifact.manifest, "cpu"))
    return make_record(
        "parity", artifact, "cpu", ladder.steps, inputs=inputs.records, seconds=1.5, profile="reports",
        skipped=(SkippedInput("x.png", "no image"),),
    )  # fmt: skip


@pytest.fixture
def document(record: ParityRecord) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(encode_record(record))
    return loaded


def test_decoding_inverts_encoding(record: ParityRecord, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(encode_record(record), "utf-8")
    assert read_record(tmp_path / "r.json") == record
    assert decode_record(encode_record(record, Error("failed", got="x")), "r") == record


def test_figures_that_are_not_finite_survive(record: ParityRecord) -> None:
    step = record.steps[0]
    output = step.outputs[0]
    metrics = dataclasses.replace(output.metrics, max_abs_error=math.inf, mean_relative_error=math.nan)
    outputs = (dataclasses.replace(output, metrics=metrics), *step.outputs[1:])
    changed = dataclasses.replace(record, steps=(dataclasses.replace(step, outputs=outputs), *record.steps[1:]))
    read = decode_record(encode_record(changed), "r").steps[0].outputs[0].metrics
    assert read.max_abs_error == math.inf
    assert math.isnan(read.mean_relative_error)


def test_a_record_says_what_ran_on_what(record: ParityRecord, tiny_artifact: Path) -> None:
    assert record.artifact.digest == open_artifact(tiny_artifact).digest
    assert [(step.title, step.status) for step in record.steps] == [
        ("eager fp32 on cpu", "passed"),
        ("torchscript fp32 on cpu", "passed"),
        ("onnxruntime fp32 on cpu", "passed"),
    ]
    assert (record.passed, record.partial, record.first_failure) == (True, False, None)
    groups = [(output.output, output.group) for output in record.steps[1].outputs]
    assert groups == [("embedding", None), ("tokens", None), ("tokens", "cls"), ("tokens", "patches")]
    assert all(len(output.images) == 2 for output in record.steps[1].outputs)
    assert record.steps[1].baseline == "eager fp32 on cpu"
    assert record.steps[0].baseline == "stored reference"


def test_a_record_of_a_newer_minor_is_read_and_of_a_newer_major_refused(
    document: dict[str, Any], record: ParityRecord
) -> None:
    newer = {**document, "schema": f"{SCHEMA_MAJOR}.{SCHEMA_MINOR + 1}", "colour": "blue"}
    assert decode_record(json.dumps(newer), "r") == record
    with pytest.raises(Error, match="no parity record that this version reads"):
        decode_record(json.dumps({**document, "schema": f"{SCHEMA_MAJOR + 1}.0"}), "r")


def test_a_record_of_schema_1_1_is_read_with_the_fallback_and_the_operators_that_it_tells() -> None:
    old = read_record(Path(__file__).parents[1] / "data" / "records" / "parity-1.1.json")
    (arithmetic,) = {step.conditions.arithmetic.matmul for step in old.steps if step.conditions.arithmetic}  # type: ignore[union-attr]
    assert arithmetic == pytest.approx(2.96e-7, rel=0.01)
    assert all(step.conditions is None or step.conditions.arithmetic.attention is None for step in old.steps)  # type: ignore[union-attr]
    assert {step.conditions.fallback for step in old.steps if step.conditions is not None} == {()}


def test_a_record_of_schema_1_2_is_read_without_figures_by_channel() -> None:
    old = read_record(Path(__file__).parents[1] / "data" / "records" / "parity-1.2.json")
    outputs = [output for step in old.steps for output in step.outputs]
    assert {output.metrics.max_scaled_rmse for output in outputs} == {None}
    assert {image.scaled_rmse for output in outputs for image in output.images} == {None}
    assert {check.group for step in old.steps for check in step.checks} == {None}
    assert old.passed


@pytest.mark.parametrize(("error", "text"), [(1.2e-7, "12%"), (2e-6, "200%"), (4.19e-4, "419 x"), (math.inf, "inf x")])
def test_an_error_at_a_block_is_told_as_a_share_of_its_limit(error: float, text: str) -> None:
    assert BoundaryError("blocks.5", error, 1e-6, 0, False).of_the_limit() == text


def test_a_fallback_that_is_unknown_survives(record: ParityRecord) -> None:
    step = record.steps[2]
    assert step.conditions is not None
    changed = dataclasses.replace(step, conditions=dataclasses.replace(step.conditions, fallback=None))
    unknown = dataclasses.replace(record, steps=(*record.steps[:2], changed))
    assert decode_record(encode_record(unknown), "r") == unknown


def delete(document: dict[str, Any]) -> object:
    return document.pop("steps")


@pytest.mark.parametrize(
    "damage",
    [
        delete,
        lambda d: d.update(passed="yes"),
        lambda d: d.update(colour="blue"),
        lambda d: d["steps"][0].update(status="fine"),
        lambda d: d["steps"][0]["outputs"][0]["metrics"].update(max_abs_error="large"),
        lambda d: d["steps"][0]["outputs"][0]["checks"][0].pop("limit"),
        lambda d: d["inputs"][0].update(kind=3),
    ],
)
def test_a_damaged_record_is_refused_with_the_place(
    document: dict[str, Any], damage: Callable[[dict[str, Any]], object]
) -> None:
    damage(document)
    with pytest.raises(Error, match=r"the record has (a )?wrong"):
        decode_record(json.dumps(document), "r")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"record": "bench", "schema": "1.0"}', "{" * 100_000])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(Error, match=r"not JSON|no parity record"):
        decode_record(text, "r")


def test_records_of_other_artifacts_numerics_and_images_are_told_apart(record: ParityRecord) -> None:
    assert differences(record, record) == ()
    step = record.steps[1]
    assert step.conditions is not None
    fast = dataclasses.replace(step, conditions=dataclasses.replace(step.conditions, numerics={"numerics": "fast"}))
    other = dataclasses.replace(
        record,
        artifact=dataclasses.replace(record.artifact, digest="0" * 64),
        steps=(record.steps[0], fast),
        inputs=record.inputs[:1],
        environment={**record.environment, "versions": {"torch": "0.0.0"}},
    )
    told = "\n".join(differences(record, other))
    assert f"artifact: {record.artifact.digest[:12]} and 000000000000" in told
    assert "numerics of torchscript fp32 on cpu, numerics: strict and fast" in told
    assert "version of torch: " in told
    assert "inputs: 2 and 1" in told


def test_a_record_of_schema_1_0_is_read_without_what_1_1_added(document: dict[str, Any], record: ParityRecord) -> None:
    del document["accelerator"]
    for given in document["inputs"]:
        del given["thumbnails"]
    for output in (output for step in document["steps"] for output in step["outputs"]):
        del output["token_errors"]
    read = decode_record(json.dumps({**document, "schema": "1.0"}), "r")
    assert [output.token_errors for output in read.steps[1].outputs] == [None] * 4
    assert read.steps[1].outputs[1].metrics == record.steps[1].outputs[1].metrics
    assert record.steps[1].outputs[1].token_errors is not None
