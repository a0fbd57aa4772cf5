"""Parity records as JSON that another machine can read.

Versions of the schema:
    1.0  first.
    1.1  accelerator, threads, graph, weights, inputs[].thumbnails, steps[].outputs[].token_errors.
    1.2  conditions.fallback may be null: unknown, where it was an empty list before; conditions.arithmetic of
         attention, softmax, layer_norm and rms_norm, and its dtypes.
    1.3  checks of kinds of tokens, checks[].group; metrics of errors scaled by channel; tolerances of the CPU and of
         the run's device alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from npu_runtime.errors import Error
from npu_runtime.parity.records import ParityRecord
from npu_runtime.structured import RecordSchema, read_record_text

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 3

SCHEMA = RecordSchema(
    "parity", ParityRecord, SCHEMA_MAJOR, SCHEMA_MINOR, ("error", "exit_code"), "npu-runtime parity or verify"
)


def encode_record(record: ParityRecord, error: Error | None = None) -> str:
    """The record as indented JSON, and beside it the error with which the command ends."""
    return SCHEMA.encode(record, {} if error is None else {"error": error.fields(), "exit_code": error.exit_code})


def read_record(path: str | Path) -> ParityRecord:
    """The record in a file, wherever it was made. Raises Error when it is none, damaged, or of a newer major schema."""
    return decode_record(read_record_text(path), str(path))


def decode_record(text: str, where: str) -> ParityRecord:
    """The record in `text`, read from `where`; see `read_record`."""
    return SCHEMA.decode(text, where)


def differences(one: ParityRecord, other: ParityRecord) -> tuple[str, ...]:
    """What makes two records hard to compare, in words: artifacts, devices, numerics, versions, inputs."""
    told: list[str] = []

    def tell(what: str, a: object, b: object) -> None:
        if a != b:
            told.append(f"{what}: {a} and {b}")

    tell("artifact", one.artifact.digest[:12], other.artifact.digest[:12])
    tell("weights", one.artifact.weights.state_sha256[:12], other.artifact.weights.state_sha256[:12])
    tell("device", one.device, other.device)
    tell("processor", one.environment.get("processor"), other.environment.get("processor"))
    numerics = [
        {step.title: dict(step.conditions.numerics) for step in record.steps if step.conditions is not None}
        for record in (one, other)
    ]
    for title in numerics[0]:
        if title in numerics[1]:
            a, b = numerics[0][title], numerics[1][title]
            changed = [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
            for name in changed:
                tell(f"numerics of {title}, {name}", a.get(name), b.get(name))
    versions = [dict(_mapping(record.environment.get("versions"))) for record in (one, other)]
    for package in dict.fromkeys((*versions[0], *versions[1])):
        tell(f"version of {package}", versions[0].get(package), versions[1].get(package))
    if {i.sha256 for i in one.inputs} != {i.sha256 for i in other.inputs}:
        told.append(f"inputs: {len(one.inputs)} and {len(other.inputs)}, not the same images")
    return tuple(told)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
