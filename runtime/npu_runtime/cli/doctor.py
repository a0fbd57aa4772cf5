"""npu-runtime doctor: what this machine can run, and what to do about the rest."""

from __future__ import annotations

import click
from rich.markup import escape

from npu_runtime.cli.console import StepProgress, print_error, print_json, print_line, print_table
from npu_runtime.cli.options import json_option, quiet_option
from npu_runtime.devices import parse_device
from npu_runtime.devices.doctor import Check, Findings, Machine, examine
from npu_runtime.devices.doctor.check import VariableCheck
from npu_runtime.environment import describe_environment
from npu_runtime.structured import to_json

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "absent": "dim"}
VALUE_WIDTH, FOUND_WIDTH = 24, 110
"""Characters of a cell, with which a table's row fits its least width."""


@click.command()
@click.option("--device", metavar="DEVICE", help="Exit with 4 unless this one can run.  [default: only describe]")
@quiet_option
@json_option
def command(device: str | None, as_json: bool) -> None:
    """Say what this machine can run, and what to do about the rest.

    Looks at Python and the packages, at CANN, the driver and npu-smi, at the devices, and at environment
    variables that matter. Each gets a verdict: ok; warn, it runs but not as it should; fail, what is
    installed, set or asked for cannot work; absent, not here and not needed by what is. Nothing is changed.
    """
    asked = None if device is None else parse_device(device)
    with StepProgress().step("look at this machine"):
        findings = examine(Machine(), asked)
    error = None if asked is None else findings.probes[str(asked)].error
    if as_json:
        print_json(
            {
                "record": "doctor",
                "environment": describe_environment(),
                "checks": [
                    {"group": group, **to_json(check)} for group, checks in findings.checks.items() for check in checks
                ],
                "devices": {
                    name: {
                        "available": probe.available,
                        "name": probe.name,
                        "error": None if probe.error is None else probe.error.fields(),
                    }
                    for name, probe in findings.probes.items()
                },
                **({"error": error.fields(), "exit_code": error.exit_code} if error else {}),
            }
        )
    else:
        _print(findings)
    if error is not None:
        print_error(error)
        click.get_current_context().exit(error.exit_code)


def _print(findings: Findings) -> None:
    for group, checks in findings.checks.items():
        variables = [check for check in checks if isinstance(check, VariableCheck)]
        if variables:
            columns: tuple[str, ...] = ("variable", "verdict", "here", "advised", "what it does")
            rows = [(*_cells(check, VALUE_WIDTH), escape(check.advised), escape(check.does)) for check in variables]
        else:
            columns, rows = ("", "verdict", "found"), [_cells(check, FOUND_WIDTH) for check in checks]
        print_table(group, columns, rows, left=len(columns))
        print_line("")
    _print_advice(
        [check for checks in findings.checks.values() for check in checks if check.name not in findings.probes]
    )
    reasons: dict[str, list[str]] = {}
    for name, probe in findings.probes.items():
        if probe.error is not None:
            told = ", next: ".join(filter(None, (probe.error.what, probe.error.hint)))
            reasons.setdefault(told, []).append(name)
    for told, names in reasons.items():
        print_line(f"cannot run {', '.join(names)}: {told}")
    runs = [f"{p.device} ({p.name})" if p.name else p.device for p in findings.probes.values() if p.available]
    print_line(f"can run    {', '.join(runs) or 'nothing'}")


def _print_advice(checks: list[Check]) -> None:
    """What to do, the worst first, and what is alike once."""
    alike: dict[tuple[str, str], list[str]] = {}
    for verdict in ("fail", "warn", "ok", "absent"):
        for check in checks:
            if check.advice and check.verdict == verdict:
                alike.setdefault((verdict, check.advice), []).append(check.name)
    if alike:
        print_line("what to do")
        for (verdict, advice), names in alike.items():
            print_line(f"{verdict:<11}{', '.join(names)}: {advice}", warn=verdict == "fail")
        print_line("")


def _cells(check: Check, width: int) -> tuple[str, ...]:
    """Name, verdict and the beginning of what was found; --json has the whole."""
    found = check.found if len(check.found) <= width else check.found[: width - 1] + "…"
    style = STYLES[check.verdict]
    return escape(check.name), f"[{style}]{check.verdict}[/{style}]", escape(found)
