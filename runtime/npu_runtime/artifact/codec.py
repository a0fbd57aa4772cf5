"""Manifest to JSON and back. What comes out of `decode_manifest` needs no further check."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

from npu_runtime.artifact.schema import SCHEMA_MAJOR, SCHEMA_MINOR, Manifest, TensorSpec, input_spec
from npu_runtime.errors import ArtifactError
from npu_runtime.structured import Reader, to_json


def encode_manifest(manifest: Manifest) -> str:
    """The manifest as indented JSON. Equal manifests give equal bytes."""
    document = {"schema": f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}", **to_json(manifest)}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
    reader = Reader("the manifest", where, "the file was edited or damaged; export the artifact again", ArtifactError)
    manifest = reader.decode(Manifest, body, lenient=minor > SCHEMA_MINOR)
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
    if manifest.probes is not None:
        used[manifest.probes.file] = None
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
    impossible += [f"uint8 {list(s.shape)} of {s.name}" for s in _unknown_bytes(manifest)]
    impossible += [] if min(manifest.preprocessing.size) > 0 else [f"image size {list(manifest.preprocessing.size)}"]
    edge = manifest.preprocessing.shortest_edge
    impossible += [] if edge is None or edge >= max(manifest.preprocessing.size) else [f"shortest edge {edge}"]
    impossible += [] if all(manifest.preprocessing.std) else [f"std {list(manifest.preprocessing.std)}"]
    impossible += [] if manifest.reference.seeds else ["a reference without images"]
    for output in manifest.outputs:
        tokens = output.shape[1] if len(output.shape) == 3 and _fixed(output) else 0
        impossible += [f"{g.name} of {output.name}" for g in output.groups if not 0 <= g.start < g.stop <= int(tokens)]
    groups = {(output.name, group.name) for output in manifest.outputs for group in output.groups}
    lost_groups = dict.fromkeys(t.group for t in manifest.tolerances if t.group and (t.output, t.group) not in groups)
    impossible += [f"a tolerance of {group}, which are no tokens" for group in lost_groups]
    impossible += [f"margin {m.factor} of {m.device}" for m in manifest.margins if not m.factor >= 1]
    if manifest.probes is not None:
        lost = [f for b in manifest.probes.boundaries for f in b.places if f not in manifest.formats()]
        impossible += [f"probes of {format}" for format in dict.fromkeys(lost)]
        impossible += [f"limit {b.limit} of {b.module}" for b in manifest.probes.boundaries if b.limit <= 0]
        impossible += [] if manifest.probes.boundaries else ["probes of no boundary"]
        frozen = {program.batch for program in manifest.programs}
        impossible += [] if manifest.probes.batch in frozen else [f"probes of batch {manifest.probes.batch}"]
    if manifest.ranges is not None:
        impossible += [f"headroom {r.headroom} of {r.module}" for r in manifest.ranges.modules if r.headroom <= 0]
        impossible += [] if manifest.ranges.modules else ["ranges of no module"]
    impossible += [f"{name} kept in fp32" for name in manifest.keep_fp32 if manifest.precision == "fp32"]
    if impossible:
        raise ArtifactError(
            "the manifest has values that no artifact has",
            where=where,
            expected='batches and sizes of 1 or more, shapes that start with "B", stds other than 0, crops inside',
            got=", ".join(impossible),
            hint="the file was edited or damaged; export the artifact again",
        )


def _unknown_bytes(manifest: Manifest) -> list[TensorSpec]:
    """Tensors of uint8 that are no pixels of the size to which images are cut."""
    pixels = input_spec("uint8", manifest.preprocessing.size)
    wrong = [spec for spec in manifest.inputs if spec.dtype == "uint8" and spec.shape != pixels.shape]
    return wrong + [spec for spec in manifest.outputs if spec.dtype == "uint8"]


def _fixed(spec: TensorSpec) -> bool:
    """The shape is the batch, then sizes."""
    return spec.shape[:1] == ("B",) and all(isinstance(size, int) and size > 0 for size in spec.shape[1:])
