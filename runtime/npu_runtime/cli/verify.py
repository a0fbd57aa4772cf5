"""npu-runtime verify: hashes, then parity against the stored reference."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from npu_runtime.artifact.store import open_artifact
from npu_runtime.backends.table import backend_name
from npu_runtime.cli.console import (
    StepProgress,
    print_conditions,
    print_error,
    print_json,
    print_line,
    print_table,
    print_weights,
)
from npu_runtime.cli.options import artifact_argument, json_option, run_options, threads_option
from npu_runtime.encoder import RunOptions
from npu_runtime.environment import describe_environment
from npu_runtime.errors import ParityError, UnavailableError
from npu_runtime.parity.verify import ProgramParity, measure_parity
from npu_runtime.structured import to_json

if TYPE_CHECKING:
    from typing_extensions import Unpack


@click.command()
@artifact_argument
@click.option("--backend", metavar="NAME", help="Only this backend.  [default: each whose programs the artifact holds]")
@run_options
@threads_option
@json_option
def command(artifact: str, backend: str | None, as_json: bool, **how: Unpack[RunOptions]) -> None:
    """Check every file's hash, then every program against the stored reference, on this device.

    The reference is what the unmodified fp32 eager network gave on the CPU when the artifact was made.
    Exits with 3 when a program is farther from it than the manifest's tolerances allow. A backend that
    is not installed is listed as not run, unless it is named or the only one.
    """
    opened = open_artifact(artifact)
    manifest = opened.manifest
    steps = StepProgress()
    start = time.monotonic()
    with steps.step("hash the files"):
        opened.check_files()
    rows: list[ProgramParity] = []
    not_run: dict[str, str] = {}
    for name in [backend] if backend else map(backend_name, manifest.formats()):
        try:
            with steps.step(f"run {name}"):
                rows += measure_parity(opened, backend=name, **how)
        except UnavailableError as error:
            if backend or (not rows and len(not_run) + 1 == len(manifest.formats())):
                raise
            not_run[name] = error.what
    failed = [row for row in rows if not row.passed]
    too_far = ParityError(
        "a program is farther from the reference than its tolerance allows",
        where=f"{opened.path} on {how['device']}",
        expected="every check within its limit",
        got=", ".join(f"{r.backend} batch {r.batch} {r.output}" for r in failed),
        hint="do not use these programs here; run with --json for every figure",
    )
    if as_json:
        print_json(
            {
                "record": "verify",
                "artifact": str(opened.path),
                "digest": opened.digest,
                "weights": to_json(manifest.provenance.weights),
                "environment": describe_environment(),
                "passed": not failed,
                "programs": [{**to_json(row), "passed": row.passed} for row in rows],
                "not_run": not_run,
                "seconds": time.monotonic() - start,
                **({"error": too_far.fields(), "exit_code": too_far.exit_code} if failed else {}),
            }
        )
    else:
        print_weights(manifest)
        _print_rows(rows)
        print_conditions({row.backend: row.conditions for row in rows})
        for name, reason in not_run.items():
            print_line(f"not run   {name}: {reason}")
        print_line(
            f"{len(manifest.files)} files as recorded; parity {'FAILED' if failed else 'passed'}", warn=bool(failed)
        )
    if failed:
        print_error(too_far)
        click.get_current_context().exit(too_far.exit_code)


def _print_rows(rows: list[ProgramParity]) -> None:
    print_table(
        "difference from the eager reference",
        (
            "backend",
            "device",
            "output",
            "batch",
            "max abs",
            "limit",
            "max rel L2",
            "limit",
            "1 - min cosine",
            "verdict",
        ),
        [
            (
                row.backend,
                row.device,
                row.output,
                str(row.batch),
                f"{row.metrics.max_abs_error:.2e}",
                _limit(row, "max_abs_error"),
                f"{row.metrics.max_relative_l2_error:.2e}",
                _limit(row, "max_relative_l2_error"),
                f"{1 - row.metrics.min_cosine:.1e}",
                "pass" if row.passed else "FAIL",
            )
            for row in rows
        ],
        left=3,
    )


def _limit(row: ProgramParity, metric: str) -> str:
    return next((f"{check.limit:.0e}" for check in row.checks if check.metric == metric), "-")
