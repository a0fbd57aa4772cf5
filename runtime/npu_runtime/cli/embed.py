"""npu-runtime embed: features of image files, few or millions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npu_runtime.artifact.staging import check_new_file
from npu_runtime.artifact.store import open_artifact
from npu_runtime.backends.table import choose_backend, require_replay
from npu_runtime.bulk.formats import Rows, check_format
from npu_runtime.bulk.partial import BAD, NAMES, check_replaceable, clean_finished, open_partial, side_file
from npu_runtime.bulk.run import Counts, embed_list, write_list
from npu_runtime.bulk.sources import expand, find_images
from npu_runtime.cli.console import StepProgress, narration, print_conditions, print_json, print_line, print_weights
from npu_runtime.cli.options import artifact_argument, json_option, quiet_option, run_options, threads_option
from npu_runtime.devices import parse_device
from npu_runtime.encoder import Encoder, RunOptions, load
from npu_runtime.errors import InputError, UsageError
from npu_runtime.structured import to_json

if TYPE_CHECKING:
    from typing_extensions import Unpack


@click.command()
@artifact_argument
@click.argument("images", nargs=-1, required=True, metavar="PATH…")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("features.safetensors"),
    show_default=True,
    help="A .safetensors file with names and digest inside, a .npy array with names beside it, or a .parquet folder "
    "of part files with id, embedding and digest.",
)
@click.option("--output-name", metavar="NAME", help="Output of the encoder, such as tokens.  [default: its first]")
@click.option(
    "--backend", metavar="NAME", help="Backend to run.  [default: ONNX on the CPU where the artifact holds it]"
)
@run_options
@threads_option
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that decode images ahead of the device.  [default: the cores of this process]",
)
@click.option("-0", "--null", is_flag=True, help="Names on stdin end with a null character, not with a line.")
@click.option("--strict", is_flag=True, help="Stop at the first image that cannot be read.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted; begin where there is none.")
@click.option("--force", is_flag=True, help="Replace the output, and what an interrupted run left without --resume.")
@quiet_option
@json_option
def command(
    artifact: str,
    images: tuple[str, ...],
    output: Path,
    output_name: str | None,
    backend: str | None,
    workers: int | None,
    null: bool,
    strict: bool,
    resume: bool,
    force: bool,
    as_json: bool,
    **how: Unpack[RunOptions],
) -> None:
    """Embed images, preprocessed as the manifest records, one row for each in the order given.

    PATH is an image file, a folder (searched in the order of names, through symbolic links, each folder once), a
    glob, a tar such as a WebDataset shard (read without being extracted; a row for each image in it), or `-` for a
    list of any of these on stdin, one on each line. In folders and tars images are what is named as one.

    What cannot be read is listed with the reason in OUTPUT.bad.jsonl and does not stop the run, which then exits 0;
    it exits 1 with --strict, and where not one image was good. Names are lines of JSON, which spell line breaks and
    bytes that are no UTF-8 with escapes. OUTPUT appears when it is whole; an interrupted run keeps its rows in
    .OUTPUT.partial for --resume, which gives the same file as one run, bit for bit.
    """
    if how["graph"] is True:
        device = parse_device(how["device"])
        require_replay(backend or choose_backend(open_artifact(artifact).manifest, device), device)
    check_format(output)
    clean_finished(output)
    check_new_file(output, force=force)
    check_replaceable(output)
    missing = [image for image in images if image != "-" and not any(_exists(path) for path in expand(image))]
    if missing:
        raise InputError("there is no such image, folder or tar", where="\n".join(missing))
    if images.count("-") > 1:
        raise UsageError("stdin is read once", expected="one -", got=f"{images.count('-')} of them")
    steps = StepProgress()
    with open_partial(output, resume=resume, force=force) as partial:
        try:
            with steps.step("find the images"):
                stdin = sys.stdin.buffer if "-" in images else None
                listed = write_list(partial, find_images(images, stdin, end=b"\0" if null else b"\n"))
                in_tars = f", {listed.tars:,} tar{'s' if listed.tars > 1 else ''}" if listed.tars else ""
                steps.detail(f"{listed.found:,} images{in_tars}")
            if not listed.found:
                raise InputError("there are no images", where="\n".join(images))
            with steps.step("open the artifact"):
                encoder = load(artifact, backend=backend, **how)
                steps.detail(f"{encoder.backend} on {encoder.device}")
            with encoder:
                rows = _describe_rows(encoder, output_name)
                identity = {
                    "artifact": encoder.artifact.digest,
                    "list_sha256": listed.sha256,
                    "output_name": rows.name,
                    "backend": encoder.backend,
                    "device": str(encoder.device),
                    "numerics": how["numerics"],
                }
                before = partial.begin(rows, identity)
                left = listed.found - before.done
                with steps.step(f"embed {left:,} image{'' if left == 1 else 's'}"):
                    advance = steps.count(left, "images")
                    counts = embed_list(encoder, partial, workers=workers, strict=strict, advance=advance)
                    conditions = encoder.report()
        except KeyboardInterrupt:
            partial.end()
            if partial.interrupted:
                narration().print("the rows so far are kept; --resume goes on with them", style="yellow")
            raise
    bad_file = side_file(output, BAD) if counts.bad else None
    if not counts.embedded:
        raise InputError("not one image could be read", where=bad_file, hint="the file says why, line by line")
    names = side_file(output, NAMES) if output.suffix == ".npy" else None
    shape = (counts.embedded, *rows.shape)
    if as_json:
        return print_json(
            {
                "record": "embed",
                "output": str(output),
                "name": rows.name,
                "shape": shape,
                "counts": to_json(counts),
                "names_file": None if names is None else str(names),
                "bad_file": None if bad_file is None else str(bad_file),
                "backend": encoder.backend,
                "device": how["device"],
                "conditions": to_json(conditions),
                **rows.metadata,
            }
        )
    print_weights(encoder.manifest)
    print_conditions({encoder.backend: conditions})
    print_line(f"images    {_spell_counts(counts)}{f', listed in {bad_file}' if bad_file else ''}")
    print_line(f"{rows.name} float32 {list(shape)} in {output}{f', names in {names}' if names else ''}")


def _exists(path: str) -> bool:
    file = Path(path)
    return file.is_file() or file.is_dir()


def _describe_rows(encoder: Encoder, name: str | None) -> Rows:
    manifest = encoder.manifest
    outputs = {output.name: output for output in manifest.outputs}
    spec = outputs.get(name or manifest.outputs[0].name)
    if spec is None:
        raise UsageError(f"the encoder has no output {name}", expected=", ".join(outputs))
    metadata = {
        "artifact_digest": encoder.artifact.digest,
        "encoder": manifest.encoder,
        "weights": manifest.weights_summary(),
    }
    return Rows(spec.name, tuple(spec.of_batch(0)[1:]), metadata)


def _spell_counts(counts: Counts) -> str:
    earlier = f", {counts.resumed:,} of them by the run before" if counts.resumed else ""
    return f"{counts.found:,} found = {counts.embedded:,} embedded + {counts.bad:,} bad{earlier}"
