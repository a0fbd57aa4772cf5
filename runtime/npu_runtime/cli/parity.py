"""npu-runtime parity: the ladder from the eager reference to the exported programs on a device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from npu_runtime.artifact.schema import DeviceKind, Manifest, Tolerance
from npu_runtime.artifact.staging import check_new_file, write_file
from npu_runtime.artifact.store import Artifact, open_artifact
from npu_runtime.backends.table import EAGER, backend_name, require_eager_for, require_replay
from npu_runtime.cli.console import INTERRUPTED, StepProgress, print_error, print_line
from npu_runtime.cli.options import artifact_argument, json_option, quiet_option, run_options, threads_option
from npu_runtime.cli.parity_tables import print_parity
from npu_runtime.devices import parse_device
from npu_runtime.devices.numerics import NUMERICS
from npu_runtime.encoder import RunOptions, require_frozen
from npu_runtime.errors import Error, InputError, ParityError, UnavailableError
from npu_runtime.parity.inputs import DEFAULT_SEEDS, Inputs, InputSource, array_inputs, image_inputs, seeded_inputs
from npu_runtime.parity.ladder import Ladder, WorstInput, options_on, plan_ladder
from npu_runtime.parity.localise import localise, require_probes
from npu_runtime.parity.profiles import PROFILES
from npu_runtime.parity.record_files import encode_record
from npu_runtime.parity.records import Cause, Localisation, ParityRecord, Step, make_record

if TYPE_CHECKING:
    from typing_extensions import Unpack

NEXT: Mapping[Cause, str] = {
    "checkpoint": "the checkpoint, or how its keys are mapped, is not what the artifact was exported from",
    "precision": "compare figures under --numerics strict, and choose a --precision that the encoder bears",
    "export": "the frozen program differs from the network: export it again; --localise finds the block",
    "device": "an operator of this device differs: see npu-runtime doctor; --localise finds the block",
}


def _parse_seeds(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    parts = [] if value is None else [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected whole numbers such as 42,123, got {value!r}", context, parameter)
    return tuple(dict.fromkeys(int(part) for part in parts))


@click.command()
@artifact_argument
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="Only these exported programs.  [default: all]"
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="The frozen batch size to run; verify runs each.  [default: the smallest]",
)
@click.option("--seeds", callback=_parse_seeds, metavar="N,N…", help="Random images.  [default: 42,123,256,789,1024]")
@click.option(
    "--images", multiple=True, type=click.Path(), metavar="FILE|DIR", help="Image files, preprocessed as recorded."
)
@click.option(
    "--arrays",
    type=click.Path(),
    metavar="FILE",
    help="pixel_values, as the artifact takes them, in .npy, .npz or .safetensors.",
)
@click.option("--skip-bad", is_flag=True, help="Exit with 0 in spite of images that cannot be read.")
@click.option("--weights", metavar="FILE|DIR", help="Where the checkpoint lies now, for eager.  [default: as recorded]")
@click.option(
    "--tolerance", "limits", multiple=True, metavar="OUTPUT.METRIC=LIMIT", help="In place of the artifact's own."
)
@click.option("--profile", type=click.Choice(list(PROFILES)), help="Show other criteria beside the artifact's.")
@click.option("--localise", "look_inside", is_flag=True, help="Find the block where the error begins, by the probes.")
@click.option(
    "--record", type=click.Path(path_type=Path), metavar="FILE", help="Write the record here as well, as JSON."
)
@click.option(
    "--save-worst", type=click.Path(path_type=Path), metavar="FILE", help="Write the worst input and its outputs."
)
@click.option("--force", is_flag=True, help="Replace the files of --record and --save-worst.")
@run_options
@threads_option
@quiet_option
@json_option
def command(
    artifact: str,
    backends: tuple[str, ...],
    batch: int | None,
    seeds: tuple[int, ...],
    images: tuple[str, ...],
    arrays: str | None,
    skip_bad: bool,
    weights: str | None,
    limits: tuple[str, ...],
    profile: str | None,
    look_inside: bool,
    record: Path | None,
    save_worst: Path | None,
    force: bool,
    as_json: bool,
    **how: Unpack[RunOptions],
) -> None:
    """Compare step by step, and name the first step that is beyond its tolerance.

    Eager fp32 on the CPU against the stored reference; then, against eager fp32 on the same inputs, eager in the
    artifact's precision, each exported program on the CPU, eager on the device and each exported program there.
    Without the checkpoint the programs on the CPU answer to the stored reference and those on the device to
    them. Steps that this machine cannot make are listed with the reason.

    With --localise each exported program that failed, or each that ran on the device where none did, is run with the
    outputs of the network's blocks beside its own, a few at a time, and the first block that leaves the recorded
    reference is named. It needs an artifact that was exported with --probes, and no checkpoint.

    Exits with 3 when a step fails, 4 when nothing could be run on the device, 1 when an image could not be read.
    """
    for file in (record, save_worst):
        if file is not None:
            check_new_file(file, force=force)
    opened = open_artifact(artifact)
    if look_inside:
        require_probes(opened)
    overridden = tuple(_parse_tolerance(text, opened.manifest) for text in limits)
    opened = _with_tolerances(opened, overridden)
    require_eager_for(weights)
    if batch is not None:
        require_frozen(opened, (batch,), sorted({program.batch for program in opened.manifest.programs}))
    if how["graph"] is True:
        for name in backends:
            require_replay(name, parse_device(how["device"]))
    rungs = plan_ladder(opened.manifest, how["device"], [backend_name(name) for name in backends])
    progress = StepProgress()
    start = time.monotonic()
    with progress.step("hash the files"):
        opened.check_files(watch=progress)
    with progress.step("read the inputs"):
        inputs = Inputs(_sources(opened.manifest, seeds, images, arrays), progress)
    ladder = Ladder(
        opened, inputs, watch=progress, batch=batch, weights=weights, profile=PROFILES.get(profile or ""), **how
    )
    interrupted = False
    localised: list[Localisation] = []
    try:
        ladder.climb(rungs)
        if look_inside:
            for step in _programs_to_look_into(ladder.steps, how["device"]):
                with progress.step(f"look into {step.title}"):
                    here = options_on(step.device, how)
                    localised.append(localise(opened, backend=step.backend, watch=progress, **here))
    except KeyboardInterrupt:
        interrupted = True
    made = make_record(
        "parity",
        opened,
        how["device"],
        ladder.steps,
        inputs=inputs.records,
        skipped=inputs.skipped,
        overridden=overridden,
        profile=profile,
        localised=localised,
        partial=interrupted,
        seconds=time.monotonic() - start,
        threads=how["threads"],
        graph=how["graph"],
        weights=weights,
    )
    error = _ending(made, asked=bool(seeds or images or arrays), skip_bad=skip_bad)
    text = encode_record(made, error)
    if record is not None:
        write_file(record, (text + "\n").encode())
    if save_worst is not None and ladder.worst is not None:
        write_file(save_worst, _encode_worst(ladder.worst))
    if as_json:
        click.echo(text)
    else:
        print_parity(made, details=True)
        if save_worst is not None and ladder.worst is not None:
            print_line(f"worst     {ladder.worst.name} and its outputs are in {save_worst}")
    if error is not None:
        print_error(error)
    click.get_current_context().exit(INTERRUPTED if interrupted else 0 if error is None else error.exit_code)


def _programs_to_look_into(steps: Sequence[Step], device: str) -> list[Step]:
    """The exported programs that failed; where none did, those that ran on the device."""
    ran = [step for step in steps if step.backend != EAGER and step.outputs]
    failed = [step for step in ran if step.status == "failed"]
    return failed or [step for step in ran if step.device == str(parse_device(device))]


def _ending(record: ParityRecord, *, asked: bool, skip_bad: bool) -> Error | None:
    """With what error the command ends; None where parity was shown on the inputs that were `asked` for."""
    failed = next((step for step in record.steps if step.status == "failed"), None)
    if failed is not None:
        return ParityError(
            f"the first step beyond its tolerance is {failed.cause}",
            where=f"{record.artifact.path}: {failed.title}",
            expected="every check within its limit",
            got=failed.reason,
            hint=NEXT[failed.cause],
        )
    if record.partial:
        return None
    if not record.passed:
        reasons = dict.fromkeys(step.reason for step in record.steps if step.status == "not run")
        return UnavailableError(f"nothing could be run on {record.device}", got="\n".join(filter(None, reasons)))
    names = {given.name for given in record.inputs}
    if asked and not any(names & set(step.inputs) for step in record.steps):
        return UnavailableError(
            "the inputs could not be run: there is nothing here to compare their outputs with",
            where=record.artifact.path,
            expected="eager fp32 on the CPU, or a device to compare with the programs on the CPU",
            got=next((step.reason for step in record.steps if step.status == "not run"), None),
            hint="say where the checkpoint lies with --weights; the stored reference was compared all the same",
        )
    if record.skipped and not skip_bad:
        return InputError(
            "images could not be read",
            where="\n".join(skipped.name for skipped in record.skipped),
            hint="parity of the others passed; --skip-bad leaves them out without an error",
        )
    return None


def _sources(
    manifest: Manifest, seeds: tuple[int, ...], images: tuple[str, ...], arrays: str | None
) -> list[InputSource]:
    """The inputs that were asked for; the default seeds where none were."""
    spec = manifest.inputs[0]
    sources = seeded_inputs(seeds or (() if images or arrays else DEFAULT_SEEDS), spec)
    sources += image_inputs(images, manifest.preprocessing, spec.dtype)
    return sources + ([] if arrays is None else array_inputs(arrays, spec))


def _parse_tolerance(text: str, manifest: Manifest) -> Tolerance:
    """`tokens.max_abs_error=1e-3` or `tokens.cls.max_scaled_error=1e-3`, for every kind of device."""
    name, _, limit = text.partition("=")
    known = {t.name: t for t in manifest.tolerances}
    try:
        value = float(limit)
    except ValueError:
        value = -1.0
    if name not in known or not 0 <= value < float("inf"):
        expected = ", ".join(f"{name}=LIMIT" for name in known)
        raise click.BadParameter(f"expected one of {expected} with a number of 0 or more, got {text!r}")
    return replace(known[name], limit=value, basis=f"given as --tolerance {text}")


def _with_tolerances(artifact: Artifact, given: tuple[Tolerance, ...]) -> Artifact:
    """The artifact with other limits than its manifest's, on every kind of device."""
    if not given:
        return artifact
    by_name, manifest = {t.name: t for t in given}, artifact.manifest
    kinds: tuple[DeviceKind, ...] = ("cpu", "cuda", "npu")
    everywhere = [
        replace(tolerance, device=kind, numerics=numerics)
        for kind in kinds
        for numerics in NUMERICS
        for tolerance in manifest.tolerances_on(kind, numerics)
    ]
    tolerances = tuple(
        replace(by_name[t.name], device=t.device, numerics=t.numerics) if t.name in by_name else t for t in everywhere
    )
    return replace(artifact, manifest=replace(manifest, tolerances=tolerances))


def _encode_worst(worst: WorstInput) -> bytes:
    """safetensors: pixel_values [1, ...], `actual.OUTPUT` and `expected.OUTPUT` [1, ...]."""
    from safetensors.numpy import save

    tensors = {"pixel_values": worst.pixel_values}
    for side, outputs in (("actual", worst.actual), ("expected", worst.expected)):
        tensors.update({f"{side}.{name}": np.ascontiguousarray(array) for name, array in outputs.items()})
    data: bytes = save(tensors, {"input": worst.name})
    return data
