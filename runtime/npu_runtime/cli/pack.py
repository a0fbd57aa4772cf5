"""npu-runtime pack: an artifact in the form that another program serves it from."""

from __future__ import annotations

import json
from pathlib import Path

import click

from npu_runtime.artifact.staging import check_output, stage
from npu_runtime.artifact.store import open_artifact
from npu_runtime.backends.table import FORMATS, backend_name
from npu_runtime.cli.console import StepProgress, print_json, print_line, print_table, print_weights, spell_nbytes
from npu_runtime.cli.options import artifact_argument, json_option, quiet_option
from npu_runtime.devices import parse_device
from npu_runtime.pack.triton import INDEX_NAME, PACK, plan_models, write_repository
from npu_runtime.structured import to_json


@click.command()
@artifact_argument
@click.option("--for", "target", type=click.Choice(["triton"]), required=True, help="What is to serve it.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the pack, a model repository.",
)
@click.option(
    "--backend",
    metavar="NAME",
    help="Programs of this backend alone: onnxruntime or torchscript.  [default: each that the artifact holds]",
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Where it is to be served: cpu or cuda:N."
)
@click.option("--force", is_flag=True, help="Replace a pack that is there.")
@quiet_option
@json_option
def command(
    artifact: str, target: str, output: Path, backend: str | None, device: str, force: bool, as_json: bool
) -> None:
    """Write a Triton model repository: a model for each program, with config.pbtxt and its own copy of the weights.

    Every file is checked against the manifest while it is copied; the output appears when it is whole. Programs have
    fixed shapes, so a request brings as many images as its model's batch. Of TorchScript, whose pytorch backend
    calls `forward` alone, each entry point is saved again as one, which needs torch, and compared with itself bit for
    bit. Nothing of Triton is needed here.
    """
    opened = open_artifact(artifact)
    formats: tuple[str, ...] = opened.manifest.formats()
    if backend is not None:
        formats = tuple(name for name, opener in FORMATS.items() if opener == backend_name(backend)) or (backend,)
    models = plan_models(opened, formats, parse_device(device))
    check_output(output, force=force, kind=PACK)
    steps = StepProgress()
    with stage(output, force=force, watch=steps, kind=PACK) as folder:
        files = write_repository(opened, models, folder, steps)
        index = {
            "pack": target,
            "artifact_digest": opened.digest,
            "encoder": opened.manifest.encoder,
            "precision": opened.manifest.precision,
            "weights": opened.manifest.weights_summary(),
            "device": str(parse_device(device)),
            "models": [{"name": m.name, "backend": m.backend, "batch": m.program.batch} for m in models],
            "files": to_json(files),
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    if as_json:
        return print_json({"record": "pack", "output": str(output), **index})
    print_weights(opened.manifest)
    sizes = {m.name: sum(f.nbytes for f in files if f.file.startswith(f"{m.name}/")) for m in models}
    print_table(
        f"{opened.manifest.encoder} {opened.manifest.precision} for {target} in {output}",
        ("model", "backend", "images", "size"),
        [(m.name, m.backend, str(m.program.batch), spell_nbytes(sizes[m.name])) for m in models],
        left=2,
    )
    print_line(f"next      tritonserver --model-repository={output}")
