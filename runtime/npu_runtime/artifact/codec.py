"""Manifest to JSON and back. What comes out of `decode_manifest` needs no further check."""

from __future__ import annotations

import json
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import PurePosixPath
from typing import Any

from npu_runtime.artifact.schema import SCHEMA_MAJOR, SCHEMA_MINOR, Manifest, TensorSpec
from npu_runtime.errors import ArtifactError


def encode_manifest(manifest: Manifest) -> str:
    """The manifest as indented JSON. Equal manifests give equal bytes."""
    document = {"schema": f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}", **to_json(manifest)}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what `json` writes; NaN and infinity, which JSON lacks, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return value


def decode_manifest(text: str, where: str) -> Manifest:
    """The manifest in `text`, read from `where`.

    A newer minor schema is read and what it adds is ignored. Raises ArtifactError for a newer major
    schema, for JSON that is not a manifest, for paths that leave the folder, and for values that no
    artifact has, such as a batch of 0.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            "the manifest is not JSON", where=where, got=error, hint="export the artifact again"
        ) from error
    minor = _check_schema(document, where)
    body = {name: value for name, value in document.items() if name != "schema"}
    manifest: Manifest = _decode(Manifest, body, where, "", minor > SCHEMA_MINOR)
    _check_consistent(manifest, where)
    return manifest


def _check_schema(document: Any, where: str) -> int:
    version = document.get("schema") if isinstance(document, dict) else None
    match = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", version) if isinstance(version, str) else None
    if match is None:
        raise ArtifactError(
            "the manifest names no schema version",
            where=where,
            expected=f'"schema": "{SCHEMA_MAJOR}.{SCHEMA_MINOR}"',
            got=json.dumps(version),
            hint="this is not an artifact that npu-export wrote; export it again",
        )
    major, minor = int(match[1]), int(match[2])
    if major != SCHEMA_MAJOR:
        raise ArtifactError(
            "the artifact has another major schema version",
            where=where,
            expected=f"schema {SCHEMA_MAJOR}.x",
            got=f"schema {version}",
            hint="upgrade npu-export to read it" if major > SCHEMA_MAJOR else "export it again",
        )
    return minor


def _decode(kind: Any, value: Any, where: str, at: str, lenient: bool) -> Any:
    """`value` as `kind`; `at` is the path inside the document, for messages."""
    origin = typing.get_origin(kind)
    if is_dataclass(kind):
        return _decode_fields(kind, value, where, at, lenient)
    if origin is tuple and isinstance(value, list):
        arguments = typing.get_args(kind)
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            pairs = enumerate(zip(arguments, value))
            return tuple(_decode(k, v, where, f"{at}[{i}]", lenient) for i, (k, v) in pairs)
    elif origin in (typing.Union, types.UnionType):
        for choice in typing.get_args(kind):
            if _is_scalar(choice, value):
                return value
    elif origin is Mapping and isinstance(value, dict):
        item = typing.get_args(kind)[1]
        return {name: _decode(item, v, where, f"{at}.{name}", lenient) for name, v in value.items()}
    elif _is_scalar(kind, value):
        return float(value) if kind is float else value
    raise ArtifactError(
        f"the manifest has a wrong value at {at or 'its top'}",
        where=where,
        expected=_describe(kind),
        got=json.dumps(value)[:200],
        hint="the file was edited or damaged; export the artifact again",
    )


def _decode_fields(kind: Any, value: Any, where: str, at: str, lenient: bool) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    # What a minor version added has a default, and older manifests lack it.
    required = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    got = list(value) if isinstance(value, dict) else None
    if got is None or required - set(got) or (set(got) - set(names) and not lenient):
        raise ArtifactError(
            f"the manifest has wrong fields at {at or 'its top'}",
            where=where,
            expected=", ".join(names),
            got=json.dumps(value)[:200] if got is None else ", ".join(got),
            hint="the file was edited or damaged; export the artifact again",
        )
    present = [name for name in names if name in value]
    return kind(**{n: _decode(hints[n], value[n], where, f"{at}.{n}".lstrip("."), lenient) for n in present})


def _is_scalar(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind) and not isinstance(value, bool)
    if kind is type(None):
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if kind is float:  # json reads NaN, Infinity and 1e999; a limit of those would judge nothing
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return typing.get_origin(kind) is None and isinstance(value, kind)


def _describe(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _check_consistent(manifest: Manifest, where: str) -> None:
    """Refuse what types cannot: paths that leave the folder, names that point at nothing, impossible values."""
    records = {record.file: record for record in manifest.files}
    for name in records:
        path = PurePosixPath(name)
        inside = name.isprintable() and not path.is_absolute() and ".." not in path.parts and path.name
        if not inside or "\\" in name or str(path) != name:
            raise ArtifactError(
                "the manifest lists a path outside the artifact",
                where=where,
                expected="a relative path with slashes and without ..",
                got=repr(name),
                hint="do not use this artifact; export it again from weights that you trust",
            )
    used = {manifest.reference.file: None}
    for program in manifest.programs:
        used.update(dict.fromkeys((program.file, *program.needs)))
    hashes = [(listed.file, listed.sha256) for listed in manifest.files]
    hashes += [(program.file, program.sha256) for program in manifest.programs]
    for name, sha256 in hashes:
        record = records.get(name)
        if record is not None and record.sha256 != sha256:
            raise ArtifactError(
                "the manifest gives two hashes for one file",
                where=f"{where}: {name}",
                expected=record.sha256,
                got=sha256,
                hint="the file was edited; export the artifact again",
            )
    names = {output.name for output in manifest.outputs}
    unknown = [name for name in used if name not in records]
    unknown += [t.output for t in manifest.tolerances if t.output not in names]
    if unknown or not manifest.programs or not manifest.inputs or not manifest.outputs:
        raise ArtifactError(
            "the manifest is incomplete",
            where=where,
            expected="programs, inputs and outputs; every name that is used is listed",
            got=", ".join(unknown) or "an empty list",
            hint="the file was edited or damaged; export the artifact again",
        )
    impossible = [f"batch {p.batch} of {p.file}" for p in manifest.programs if p.batch < 1]
    impossible += [f"shape {list(s.shape)} of {s.name}" for s in (*manifest.inputs, *manifest.outputs) if not _fixed(s)]
    impossible += [] if min(manifest.preprocessing.size) > 0 else [f"image size {list(manifest.preprocessing.size)}"]
    edge = manifest.preprocessing.shortest_edge
    impossible += [] if edge is None or edge >= max(manifest.preprocessing.size) else [f"shortest edge {edge}"]
    impossible += [] if all(manifest.preprocessing.std) else [f"std {list(manifest.preprocessing.std)}"]
    impossible += [] if manifest.reference.seeds else ["a reference without images"]
    if impossible:
        raise ArtifactError(
            "the manifest has values that no artifact has",
            where=where,
            expected='batches and sizes of 1 or more, shapes that start with "B", stds other than 0, crops inside',
            got=", ".join(impossible),
            hint="the file was edited or damaged; export the artifact again",
        )


def _fixed(spec: TensorSpec) -> bool:
    """The shape is the batch, then sizes."""
    return spec.shape[:1] == ("B",) and all(isinstance(size, int) and size > 0 for size in spec.shape[1:])
