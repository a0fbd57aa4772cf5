"""npu-runtime verify: hashes, then parity against the stored reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from npu_runtime.artifact.store import open_artifact
from npu_runtime.backends.table import backend_name, require_replay
from npu_runtime.cli.console import StepProgress, print_error, print_line
from npu_runtime.cli.options import artifact_argument, json_option, quiet_option, run_options, threads_option
from npu_runtime.cli.parity_tables import print_parity
from npu_runtime.devices import Device, parse_device
from npu_runtime.encoder import RunOptions
from npu_runtime.errors import ParityError, UnavailableError, UsageError
from npu_runtime.parity.inputs import Inputs, reference_inputs
from npu_runtime.parity.record_files import encode_record
from npu_runtime.parity.records import Step, make_record, not_run
from npu_runtime.parity.verify import measure_parity

if TYPE_CHECKING:
    from typing_extensions import Unpack


@click.command()
@artifact_argument
@click.option("--backend", metavar="NAME", help="Only this backend.  [default: each whose programs the artifact holds]")
@run_options
@threads_option
@quiet_option
@json_option
def command(artifact: str, backend: str | None, as_json: bool, **how: Unpack[RunOptions]) -> None:
    """Check every file's hash, then every program against the stored reference, on this device.

    The reference is what the unmodified fp32 eager network gave on the CPU when the artifact was made.
    Exits with 3 when a program is farther from it than the manifest's tolerances allow. A backend that
    is not installed is listed as not run, unless it is named or the only one.
    """
    opened = open_artifact(artifact)
    formats = opened.manifest.formats()
    not_replayed = {} if how["graph"] is not True else _without_replay(backend, formats, parse_device(how["device"]))
    progress = StepProgress()
    start = time.monotonic()
    with progress.step("hash the files"):
        opened.check_files(watch=progress)
    steps: list[Step] = []
    absent: UnavailableError | None = None
    for name in [backend] if backend else map(backend_name, formats):
        if name in not_replayed:
            steps.append(not_run(name, how["device"], opened.manifest.precision, not_replayed[name]))
            continue
        try:
            with progress.step(f"run {name}"):
                steps += measure_parity(opened, backend=name, watch=progress, **how)
        except UnavailableError as unavailable:
            if backend:
                raise
            absent = unavailable
            steps.append(not_run(name, how["device"], opened.manifest.precision, unavailable.what))
    if absent is not None and all(step.status == "not run" for step in steps):
        raise absent
    record = make_record(
        "verify",
        opened,
        how["device"],
        steps,
        inputs=Inputs(reference_inputs(opened)).records,
        seconds=time.monotonic() - start,
        threads=how["threads"],
        graph=how["graph"],
    )
    failed = [step for step in steps if step.status == "failed"]
    error = None
    if failed:
        error = ParityError(
            "a program is farther from the reference than its tolerance allows",
            where=f"{opened.path} on {record.device}",
            expected="every check within its limit",
            got="\n".join(f"{step.backend} batch {step.batches[0]}: {step.reason}" for step in failed),
            hint="do not use these programs here; npu-runtime parity says where it comes from",
        )
    if as_json:
        click.echo(encode_record(record, error))
    else:
        print_line(f"files     {len(opened.manifest.files)}, each as recorded")
        print_parity(record, details=False)
    if error is not None:
        print_error(error)
        click.get_current_context().exit(error.exit_code)


def _without_replay(backend: str | None, formats: Sequence[str], device: Device) -> dict[str, str]:
    """The backends that replay no graphs, with the reason; raises UsageError for one that is named or the only one."""
    found: dict[str, str] = {}
    for name in [backend] if backend else map(backend_name, formats):
        try:
            require_replay(name, device)
        except UsageError as error:
            if backend or len(found) + 1 == len(formats):
                raise
            found[name] = error.what
    return found
