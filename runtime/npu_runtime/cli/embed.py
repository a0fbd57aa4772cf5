"""npu-runtime embed: features of image files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from npu_runtime.artifact.staging import check_new_file, write_file
from npu_runtime.artifact.store import Array
from npu_runtime.cli.console import StepProgress, print_conditions, print_json, print_line, print_weights
from npu_runtime.cli.options import artifact_argument, json_option, quiet_option, run_options, threads_option
from npu_runtime.encoder import RunOptions, load
from npu_runtime.errors import InputError, UsageError
from npu_runtime.structured import to_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
@click.option(
    "--backend", metavar="NAME", help="Backend to run.  [default: ONNX on the CPU where the artifact holds it]"
)
@run_options
@threads_option
@click.option("--force", is_flag=True, help="Replace the output file.")
@quiet_option
@json_option
def command(
    artifact: str,
    images: tuple[str, ...],
    output: Path,
    backend: str | None,
    force: bool,
    as_json: bool,
    **how: Unpack[RunOptions],
) -> None:
    """Embed image files, preprocessed as the manifest records, one row [D] for each in the order given."""
    if output.suffix not in SUFFIXES:
        raise UsageError("unknown kind of output", where=output, expected=" or ".join(SUFFIXES), got=output.suffix)
    check_new_file(output, force=force)
    missing = [image for image in images if not Path(image).is_file()]
    if missing:
        raise InputError("there is no such image file", where="\n".join(missing))
    steps = StepProgress()
    with steps.step("open the artifact"):
        encoder = load(artifact, backend=backend, **how)
        steps.detail(f"{encoder.backend} on {encoder.device}")
    with encoder, steps.step(f"embed {len(images)} image{'s' if len(images) > 1 else ''}"):
        features = encoder.embed(images, advance=steps.count(len(images), "images"))
        conditions = encoder.report()
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
                "device": how["device"],
                "conditions": to_json(conditions),
                **metadata,
                "images": images,
            }
        )
    print_weights(manifest)
    print_conditions({encoder.backend: conditions})
    for image, row in zip(images, features):
        print_line(f"{image}  norm {np.linalg.norm(row):.4f}  first {' '.join(f'{value:+.4f}' for value in row[:4])} …")
    print_line(f"{name} float32 {list(features.shape)} in {output}")


def write_features(output: Path, name: str, features: Array, metadata: Mapping[str, str]) -> None:
    """Write one array to a `.safetensors` file, metadata inside, or a `.npy` file; whole or not at all."""
    if output.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, features)
        data = buffer.getvalue()
    else:
        from safetensors.numpy import save

        data = save({name: features}, dict(metadata))
    write_file(output, data)
