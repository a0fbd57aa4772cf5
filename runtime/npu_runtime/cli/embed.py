"""npu-runtime embed: features of image files."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np

from npu_runtime.artifact.store import Array
from npu_runtime.cli.console import StepProgress, print_json, print_line, print_weights
from npu_runtime.cli.options import artifact_argument, device_option, json_option, threads_option
from npu_runtime.encoder import load
from npu_runtime.errors import UsageError

SUFFIXES = (".safetensors", ".npy")


@click.command()
@artifact_argument
@click.argument("images", nargs=-1, required=True, metavar="IMAGE…")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("features.safetensors"),
    show_default=True,
    help="A .safetensors file with names and digest inside, or a .npy array.",
)
@click.option("--backend", metavar="NAME", help="Backend to run. [ONNX on the CPU where the artifact holds it]")
@device_option
@threads_option
@click.option("--force", is_flag=True, help="Replace the output file.")
@json_option
def command(
    artifact: str,
    images: tuple[str, ...],
    output: Path,
    backend: str | None,
    device: str,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Embed image files, preprocessed as the manifest records, one row [D] for each in the order given."""
    if output.suffix not in SUFFIXES:
        raise UsageError("unknown kind of output", where=output, expected=" or ".join(SUFFIXES), got=output.suffix)
    if output.exists() and not force:
        raise UsageError("the output exists", where=output, hint="pass --output with another name, or --force")
    steps = StepProgress()
    with steps.step("open the artifact"):
        encoder = load(artifact, device=device, backend=backend, threads=threads)
        steps.detail(f"{encoder.backend} on {encoder.device}")
    with encoder, steps.step(f"embed {len(images)} image{'s' if len(images) > 1 else ''}"):
        features = encoder.embed(images)
    manifest = encoder.manifest
    name = manifest.outputs[0].name
    metadata = {
        "artifact_digest": encoder.artifact.digest,
        "encoder": manifest.encoder,
        "weights": manifest.weights_summary(),
        "images": json.dumps(images, ensure_ascii=False),
    }
    write_features(output, name, features, metadata)
    if as_json:
        return print_json(
            {
                "record": "embed",
                "output": str(output),
                "name": name,
                "shape": features.shape,
                "backend": encoder.backend,
                "device": device,
                **metadata,
                "images": images,
            }
        )
    print_weights(manifest)
    for image, row in zip(images, features):
        print_line(f"{image}  norm {np.linalg.norm(row):.4f}  first {' '.join(f'{value:+.4f}' for value in row[:4])} …")
    print_line(f"{name} float32 {list(features.shape)} in {output}")


def write_features(output: Path, name: str, features: Array, metadata: Mapping[str, str]) -> None:
    """Write one array to a `.safetensors` file, metadata inside, or a `.npy` file; whole or not at all."""
    partial = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    try:
        if output.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, features)
        else:
            from safetensors.numpy import save_file

            save_file({name: features}, partial, metadata=dict(metadata))
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
