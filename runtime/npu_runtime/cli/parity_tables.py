"""A parity record as tables on stdout, wherever the record was made."""

from __future__ import annotations

from collections.abc import Callable

from npu_runtime.cli.console import print_conditions, print_line, print_table
from npu_runtime.parity.record_files import differences
from npu_runtime.parity.records import Localisation, OutputParity, ParityRecord, Step

Column = tuple[str, Callable[[OutputParity], str]]

FIGURES: tuple[Column, ...] = (
    ("max abs", lambda o: f"{o.metrics.max_abs_error:.1e}"),
    ("mean abs", lambda o: f"{o.metrics.mean_abs_error:.1e}"),
    ("rmse", lambda o: f"{o.metrics.rmse:.1e}"),
    ("by channel", lambda o: _optional(o.metrics.max_scaled_rmse)),
    ("max rel L2", lambda o: f"{o.metrics.max_relative_l2_error:.1e}"),
    ("1 - cosine, p1", lambda o: f"{1 - o.metrics.p01_cosine:.1e}"),
    ("least", lambda o: f"{1 - o.metrics.min_cosine:.1e}"),
    ("rel err", lambda o: f"{o.metrics.mean_relative_error:.1e}"),
    ("trimmed", lambda o: f"{o.metrics.trimmed_relative_error:.1e}"),
    ("top-1", lambda o: f"{o.metrics.top1_agreement:.4g}"),
    ("top-5", lambda o: f"{o.metrics.top5_agreement:.4g}"),
    ("neighbours", lambda o: "-" if o.neighbours_kept is None else f"{o.neighbours_kept:.4g}"),
)
"""Heading -> figure over the images. Errors beside cosines as 1 - cosine, which shows what a cosine near 1 hides."""


def print_parity(record: ParityRecord, *, details: bool) -> None:
    """The steps with their limits and verdicts; with `details`, every figure, kinds of tokens apart."""
    artifact = record.artifact
    print_line(f"weights   {artifact.summary}", warn=artifact.weights.random_seed is not None)
    print_table(
        f"{artifact.encoder} {artifact.precision}: difference from the baseline",
        (
            "step",
            "against",
            "batch",
            "output",
            "images",
            "max abs",
            "limit",
            "rel L2",
            "limit",
            "by channel",
            "limit",
            "verdict",
        ),
        [row for step in record.steps for row in _judged_rows(step)],
        left=4,
    )
    if details:
        print_line("")
        print_table(
            "every output, and its kinds of tokens",
            ("step", "output", *(name for name, _ in FIGURES)),
            [
                (
                    step.title,
                    output.output if output.group is None else f"  {output.group}",
                    *(f(output) for _, f in FIGURES),
                )
                for step in record.steps
                for output in step.outputs
            ],
            left=2,
        )
    if record.profile is not None:
        print_line("")
        _print_profile(record)
    for localised in record.localised:
        _print_localised(localised)
    print_conditions({step.title: step.conditions for step in record.steps if step.conditions is not None})
    if any(tolerance.numerics == "fast" for tolerance in record.tolerances):
        print_line(
            f"limits    on {record.device} those of fast numerics: products of TF32 or HF32 operands, GELU by tanh"
        )
    for tolerance in record.overridden:
        print_line(f"tolerance {tolerance.output}.{tolerance.metric} {tolerance.limit:g}, {tolerance.basis}", warn=True)
    for step in record.steps:
        if step.status == "not run":
            print_line(f"not run   {step.title}: {step.reason}")
    for skipped in record.skipped:
        print_line(f"skipped   {skipped.name}: {skipped.reason}", warn=True)
    print_line(_verdict(record), warn=not record.passed)


def print_differences(record: ParityRecord, other: ParityRecord, name: str) -> None:
    """The figures of two records side by side, after what makes them hard to compare."""
    for told in differences(record, other):
        print_line(f"not alike {told}", warn=True)
    before = {(step.title, o.output, o.group): o for step in other.steps for o in step.outputs}
    rows = []
    for step in record.steps:
        for output in step.whole_outputs:
            old = before.get((step.title, output.output, output.group))
            was, now = (o and o.metrics.max_relative_l2_error for o in (old, output))
            rows.append((step.title, output.output, "-" if was is None else f"{was:.2e}", f"{now:.2e}"))
    print_table(f"max rel L2 against {name}", ("step", "output", "there", "here"), rows, left=2)


def _print_profile(record: ParityRecord) -> None:
    """A row for each output, a column for each criterion."""
    judged = [(step.title, output) for step in record.steps for output in step.whole_outputs if output.profile]
    criteria = judged[0][1].profile if judged else ()
    signs = {"at most": "≤", "at least": "≥"}
    print_table(
        f"the criteria of the profile {record.profile}, which decide nothing here",
        ("step", "output", *(f"{c.metric.replace('_', ' ')} {signs[c.comparison]} {c.limit:g}" for c in criteria)),
        [
            (title, output.output, *(f"{'' if c.passed else 'FAIL '}{c.value:.3g}" for c in output.profile))
            for title, output in judged
        ],
        left=2,
    )


def _print_localised(localised: Localisation) -> None:
    """The finding, and the boundaries about it."""
    print_line("")
    at = [boundary.module for boundary in localised.boundaries].index(localised.first) if localised.first else None
    near = () if at is None else localised.boundaries[max(at - 2, 0) : at + 3]
    title = f"{localised.backend} on {localised.device}, batch {localised.batch}: where the error begins"
    if near:
        print_table(
            title,
            ("output of", "rel L2", "limit", "of the limit", "NaN or inf", "verdict"),
            [
                (
                    boundary.module,
                    f"{boundary.relative_l2_error:.1e}",
                    f"{boundary.limit:.1e}",
                    boundary.of_the_limit(),
                    str(boundary.nonfinite),
                    "pass" if boundary.passed else "FAIL",
                )
                for boundary in near
            ],
        )
    print_line(f"localised {localised.backend} on {localised.device}: {localised.describe()}", warn=at is not None)


def _judged_rows(step: Step) -> list[tuple[str, ...]]:
    if not step.outputs:
        verdict = "not run" if step.status == "not run" else step.status.upper()
        return [(step.title, step.baseline, *["-"] * 9, verdict)]
    rows: list[tuple[str, ...]] = []
    shown = [output for output in step.outputs if output.group is None or not all(c.passed for c in output.checks)]
    for index, output in enumerate(shown):
        first = index == 0
        rows.append(
            (
                step.title if first else "",
                step.baseline if first else "",
                ",".join(map(str, step.batches)) if first else "",
                output.output if output.group is None else f"  {output.group}",
                str(output.metrics.images),
                f"{output.metrics.max_abs_error:.1e}",
                _limit(output, "max_abs_error"),
                f"{output.metrics.max_relative_l2_error:.1e}",
                _limit(output, "max_relative_l2_error"),
                _optional(output.metrics.max_scaled_rmse),
                _limit(output, "max_scaled_rmse"),
                _output_verdict(step, output),
            )
        )
    return rows


def _output_verdict(step: Step, output: OutputParity) -> str:
    if step.status == "interrupted":
        return "partial"
    return "pass" if output.passed else "FAIL"


def _limit(output: OutputParity, metric: str) -> str:
    return next((f"{check.limit:.1e}" for check in output.checks if check.metric == metric), "-")


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _verdict(record: ParityRecord) -> str:
    if record.first_failure is not None:
        step = next(step for step in record.steps if step.status == "failed")
        worst = f", farthest at {step.worst}" if step.worst else ""
        return f"parity FAILED at the step {record.cause}: {step.title}{worst}\n          {step.reason}"
    if record.partial:
        return "interrupted: what was measured until then is above, and no verdict on the rest"
    if not record.passed:
        return f"no verdict: nothing ran on {record.device}"
    return "parity passed"
