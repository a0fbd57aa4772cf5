"""npu-runtime inspect: what is in an artifact."""

from __future__ import annotations

import click

from npu_runtime.artifact.range_text import spell_ranges
from npu_runtime.artifact.schema import TensorSpec
from npu_runtime.artifact.store import open_artifact
from npu_runtime.cli.console import (
    print_json,
    print_line,
    print_table,
    print_weights,
    spell_nbytes,
    spell_preprocessing,
)
from npu_runtime.cli.options import artifact_argument, json_option, quiet_option
from npu_runtime.cli.range_tables import print_ranges
from npu_runtime.structured import to_json


@click.command()
@artifact_argument
@quiet_option
@json_option
def command(artifact: str, as_json: bool) -> None:
    """Show what is in an artifact. Reads the manifest only; `verify` checks the files."""
    opened = open_artifact(artifact)
    manifest = opened.manifest
    if as_json:
        return print_json({"artifact": str(opened.path), "digest": opened.digest, "manifest": to_json(manifest)})
    provenance = manifest.provenance
    print_line(
        f"encoder   {manifest.encoder} {manifest.precision}   {provenance.weights.coverage.parameters:,} parameters"
    )
    print_weights(manifest)
    for spec in manifest.inputs:
        print_line(f"input     {_spell(spec)}, {spell_nbytes(spec.nbytes(1))} an image")
    for spec in manifest.outputs:
        print_line(f"output    {_spell(spec)}")
    print_line(f"images    {spell_preprocessing(manifest.preprocessing)}")
    numerics = [f"{name.removeprefix('torch.')} {value}" for name, value in manifest.reference.numerics.items()]
    print_line(
        f"reference fp32 eager on the CPU, {len(manifest.reference.seeds)} images, "
        f"{', '.join(numerics) or 'numerics not recorded'}"
    )
    probes = manifest.probes
    told = "none; export with --probes to find faults by block"
    if probes is not None:
        told = f"{len(probes.boundaries)} boundaries, {probes.boundaries[0].module} to {probes.boundaries[-1].module}, "
        told += f"batch {probes.batch}; limits {probes.basis}"
    print_line(f"probes    {told}")
    if manifest.ranges is not None:
        print_line(f"ranges    {spell_ranges(manifest.ranges)}")
    if manifest.keep_fp32:
        print_line(f"float32   {', '.join(manifest.keep_fp32)}")
    print_line(f"made with {', '.join(f'{name} {version}' for name, version in provenance.versions.items())}")
    print_line(f"digest    {opened.digest}\n")
    print_table(
        "programs",
        ("format", "file", "entry point", "batch", "opset"),
        [
            (p.format, p.file, p.entry_point or "-", str(p.batch), "-" if p.opset is None else str(p.opset))
            for p in manifest.programs
        ],
        left=3,
    )
    print_line("")
    if manifest.ranges is not None:
        print_ranges(manifest.ranges, manifest.keep_fp32)
        print_line("")
    print_table(
        "files",
        ("file", "sha256", "size"),
        [(record.file, record.sha256[:16], spell_nbytes(record.nbytes)) for record in manifest.files],
        left=2,
    )


def _spell(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"
