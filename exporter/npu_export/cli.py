"""The command npu-export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from npu_export.encoders import ENCODERS
from npu_export.errors import PrecisionError
from npu_export.plan import (
    AUTO,
    DEFAULT_OPSET,
    FORMATS,
    INPUTS,
    PRECISIONS,
    PUBLISHERS,
    ExportPlan,
    make_request,
    plan_export,
)
from npu_export.recognise import describe_coverage
from npu_runtime import __version__
from npu_runtime.artifact.range_text import spell_ranges
from npu_runtime.cli.console import (
    StepProgress,
    print_json,
    print_line,
    print_table,
    print_weights,
    run_command,
    spell_nbytes,
    spell_preprocessing,
)
from npu_runtime.cli.options import json_option, parse_batches, quiet_option
from npu_runtime.cli.range_tables import print_ranges
from npu_runtime.errors import UsageError
from npu_runtime.structured import to_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from npu_runtime.artifact.schema import Ranges


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", metavar="NAME", help="Encoder: a name, hub id or alias that --list shows.")
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(FORMATS), help="Repeat for several.  [default: all]"
)
@click.option("--batch", default="1", show_default=True, callback=parse_batches, metavar="N,N…", help="Batch sizes.")
@click.option(
    "--weights",
    metavar="FILE|DIR|hf:ID|ms:ID|random:SEED",
    help="Where the weights lie: a file, a folder or an index of shards; hf:ID[/FILE][@REVISION] and ms:ID name a "
    "repository on Hugging Face or ModelScope, random:SEED makes seeded ones. "
    " [default: the encoder's own on the hub, from its cache first]",
)
@click.option("--layout", default="auto", show_default=True, metavar="NAME", help="Layout of the checkpoint's keys.")
@click.option(
    "--prefix",
    metavar="TEXT",
    help="Use only the keys that start so, where a file holds several networks: visual. or a dict, model_ema/.",
)
@click.option(
    "--image-size",
    type=int,
    metavar="N",
    help="Height and width in pixels; positions are resampled as the publisher does.  [default: as published]",
)
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True)
@click.option(
    "--input",
    type=click.Choice(INPUTS),
    default=INPUTS[0],
    show_default=True,
    help="What the programs take: float32 [B, 3, H, W], normalised before, or uint8 [B, H, W, 3], pixels that they "
    "normalise themselves: a quarter of the bytes to transfer.",
)
@click.option("--opset", type=int, default=DEFAULT_OPSET, show_default=True, help="ai.onnx opset; ATC reads up to 18.")
@click.option(
    "--preprocess",
    type=click.Choice(PUBLISHERS),
    help="Whose preparation of images to record, where publishers disagree: Hugging Face's, timm's or the authors'. "
    " [default: what lies beside the weights, then the first that --list shows]",
)
@click.option(
    "--probes",
    is_flag=True,
    help="Record statistics of every block, by which the one where a fault begins can be found in the artifact later.",
)
@click.option(
    "--keep-fp32",
    multiple=True,
    callback=lambda _context, _parameter, value: _split(value),
    metavar=f"{AUTO}|NAME,NAME…",
    help="Modules that stay float32 in fp16 or bf16, such as blocks.5; auto: those that float16 does not hold, by what "
    "is measured before the export.  [default: none; what float16 does not hold is refused]",
)
@click.option(
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="Images on which the ranges for fp16 are measured beside the reference's. Repeat for several.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The artifact folder itself.  [default: ./NAME-PRECISION, or ./NAME-PRECISION-uint8]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Plan from names and shapes, for fp16 measure the ranges too, print it, and write nothing.",
)
@click.option("--force", is_flag=True, help="Replace the artifact that --output names.")
@quiet_option
@json_option
@click.option("--list", "list_all", is_flag=True, help="Show encoders, layouts, formats and precisions.")
@click.version_option(__version__, prog_name="npu-export")
def command(
    model: str | None,
    formats: tuple[str, ...],
    batch: tuple[int, ...],
    weights: str | None,
    layout: str,
    prefix: str | None,
    image_size: int | None,
    precision: str,
    input: str,
    opset: int,
    preprocess: str | None,
    probes: bool,
    keep_fp32: tuple[str, ...],
    images: tuple[Path, ...],
    output: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    list_all: bool,
) -> None:
    """Export a vision encoder to a frozen artifact and check that nothing changed.

    \b
    npu-export --model vit-base --format torchscript
    npu-export --model vit-base --batch 1,4,8 --weights model.safetensors

    The artifact is a folder that npu-runtime and npu_runtime.load open. It appears under its name only
    when it is whole and its programs agree with the eager network.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 parity failed, 4 device or dependency missing,
    130 interrupted.
    """
    if list_all:
        others = [name for name in click.get_current_context().params if name not in ("list_all", "as_json")]
        if given := [f"--{name.replace('_', '-')}" for name in others if _was_given(name)]:
            raise click.UsageError(f"--list goes with no option but --json, got {', '.join(given)}")
        return _print_list(as_json)
    if model is None:
        raise click.UsageError("--model is missing; npu-export --list shows the encoders")
    formats = formats or FORMATS
    if "onnx" not in formats and _was_given("opset"):
        raise UsageError("--opset is for onnx, which is not among the formats", got=", ".join(formats))
    request = make_request(
        model,
        formats=formats,
        batch=batch,
        layout=layout,
        prefix=prefix,
        image_size=image_size,
        precision=precision,
        input=input,
        opset=opset,
        preprocess=preprocess,
        probes=probes,
        keep_fp32=keep_fp32,
        images=images,
        output=output,
        force=force,
    )
    steps = StepProgress()
    plan = plan_export(request, weights, steps)
    if dry_run:
        ranges = None
        if request.precision == "fp16":
            from npu_export.proof.headroom import measure_plan, settle_kept

            ranges = measure_plan(plan, steps)
            plan = settle_kept(plan, ranges)
        return _print_plan(plan, ranges, as_json)
    from npu_export.pipeline import run_export

    _print_result(run_export(plan, steps), as_json)


def _was_given(name: str) -> bool:
    """Whether an option was on the command line; a default was not."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def main() -> None:
    run_command(command, "npu-export")


def _print_list(as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "encoder": e.name,
                "aliases": e.aliases,
                "parameters": e.published.parameters,
                "inputs": to_json(e.inputs),
                "outputs": to_json(e.outputs),
                "preprocessing": to_json(e.preprocessing),
                "layouts": {n: [known.about for known in e.layouts if known.name == n] for n in e.layout_names()},
            }
            for e in ENCODERS
        ]
        return print_json({"encoders": rows, "formats": FORMATS, "precisions": list(PRECISIONS)})
    for encoder in ENCODERS:
        print_line(f"{encoder.name}")
        print_line(f"  also known as  {', '.join(encoder.aliases)}")
        print_line(f"  parameters     {encoder.published.parameters:,}")
        for layout in encoder.layouts:
            print_line(f"  layout         {layout.name:<9} {layout.about}")
        for steps in encoder.preprocessing:
            print_line(f"  images         {spell_preprocessing(steps)}")
        for spec in (*encoder.inputs, *encoder.outputs):
            print_line(f"  {spec.name:<13}  {spec.dtype} [{', '.join(map(str, spec.shape))}]")
    print_line(f"formats     {', '.join(FORMATS)}")
    print_line(f"precisions  {', '.join(PRECISIONS)}")


def _split(values: Sequence[str]) -> tuple[str, ...]:
    """Names given with commas, repeatedly, or both."""
    return tuple(name.strip() for value in values for name in value.split(","))


def describe_plan(plan: ExportPlan, ranges: Ranges | None) -> Mapping[str, Any]:
    """The plan as data; `ranges` are those of fp16."""
    request, weights = plan.request, plan.weights
    keymap = weights.keymap
    return {
        "encoder": request.encoder.name,
        "weights": weights.checkpoint.source,
        "layout": weights.layout.name,
        "prefix": weights.prefix,
        "why": weights.why,
        "precision": request.precision,
        "stored_dtypes": sorted({weights.checkpoint.dtypes[key] for key in keymap.sources()}),
        "formats": request.formats,
        "batches": request.batches,
        "opset": request.opset if "onnx" in request.formats else None,
        "inputs": to_json(request.inputs),
        "outputs": to_json(request.encoder.outputs),
        "probes": plan.boundaries() if request.probes else [],
        "ranges": None if ranges is None else _describe_ranges(plan, ranges),
        "keep_fp32": plan.keep_fp32,
        "output": str(request.output),
        "coverage": {
            **to_json(weights.coverage()),
            "missing": len(keymap.missing),
            "unexpected": len(keymap.unexpected),
            "mismatched": len(keymap.mismatched),
            "operations": keymap.transformed(),
            "reasons_dropped": dict(keymap.dropped),
        },
        "preprocessing": to_json(plan.preprocessing),
        "nbytes": dict(plan.sizes()),
    }


def _print_plan(plan: ExportPlan, ranges: Ranges | None, as_json: bool) -> None:
    described = describe_plan(plan, ranges)
    if as_json:
        return print_json(described)
    request, encoder, coverage = plan.request, plan.request.encoder, plan.weights.coverage()
    print_line(f"{encoder.name} from {described['weights']}, to {described['precision']}")
    print_line(f"  layout    {described['layout']}: {described['why']}")
    print_line(f"  stored    {', '.join(described['stored_dtypes'])}, {coverage.parameters:,} parameters")
    print_line(
        f"  keys      {coverage.matched} matched, {coverage.transformed} transformed, {coverage.dropped} dropped, "
        "0 missing, 0 unexpected, 0 mismatched"
    )
    for line in describe_coverage(plan.weights.keymap):
        print_line(f"            {line}")
    opset = f", opset {described['opset']}" if described["opset"] else ""
    print_line(f"  programs  {', '.join(request.formats)}{opset}, batch {', '.join(map(str, request.batches))}")
    for spec in (*request.inputs, *encoder.outputs):
        print_line(f"            {spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]")
    print_line(f"  images    {spell_preprocessing(plan.preprocessing)}")
    if described["probes"]:
        print_line(f"  probes    {len(described['probes'])} boundaries: {', '.join(described['probes'])}")
    if ranges is not None:
        print_line(f"  ranges    {spell_ranges(ranges)}")
    if plan.keep_fp32:
        print_line(f"  float32   {', '.join(plan.keep_fp32)}; {spell_nbytes(plan.kept_nbytes())} more in each format")
    for name, nbytes in plan.sizes().items():
        print_line(f"  file      {name}  {spell_nbytes(nbytes)}")
    print_line(f"  output    {request.output}  (dry run: nothing was written)")
    if ranges is not None:
        _print_ranges(plan, ranges)


def _describe_ranges(plan: ExportPlan, ranges: Ranges) -> Mapping[str, Any]:
    """The ranges, what float16 does not hold, what `--keep-fp32 auto` would keep, and whether the export is refused."""
    from npu_export.proof.headroom import find_faults, keepable

    faults = find_faults(ranges)
    return {
        **to_json(ranges),
        "not_held": dict(faults),
        AUTO: list(keepable(ranges)),
        "refused": bool(faults.keys() - set(plan.keep_fp32)),
    }


def _print_ranges(plan: ExportPlan, ranges: Ranges) -> None:
    from npu_export.proof.headroom import check_headroom

    print_line("")
    print_ranges(ranges, plan.keep_fp32)
    try:
        check_headroom(plan, ranges)
    except PrecisionError as error:
        print_line(f"\nThis export would be refused: {error}", warn=True)


def _print_result(folder: Path, as_json: bool) -> None:
    from npu_runtime.artifact.store import open_artifact

    artifact = open_artifact(folder)
    manifest = artifact.manifest
    if as_json:
        return print_json({"artifact": str(folder), "digest": artifact.digest, "manifest": to_json(manifest)})
    print_weights(manifest)
    print_table(
        f"{manifest.encoder} {manifest.precision} in {folder}",
        ("file", "size"),
        [(record.file, spell_nbytes(record.nbytes)) for record in manifest.files],
    )
    if manifest.ranges is not None:
        print_line(f"ranges    {spell_ranges(manifest.ranges)}")
    if manifest.keep_fp32:
        print_line(f"float32   {', '.join(manifest.keep_fp32)}")
    print_line(f"next      npu-runtime verify {folder}")
