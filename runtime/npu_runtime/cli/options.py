"""Arguments and options that several subcommands share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import click

from npu_runtime.backends.table import require_accelerator
from npu_runtime.cli.console import QUIET
from npu_runtime.devices import parse_device
from npu_runtime.devices.numerics import NUMERICS

MOST_CALLERS = 1000
"""Threads that a load may have; systems refuse some thousands."""

artifact_argument = click.argument("artifact", metavar="ARTIFACT")
device_option = click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to run.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads for one operator.  [default: the backend's choice, within the cores of this process]",
)
numerics_option = click.option(
    "--numerics",
    type=click.Choice(NUMERICS),
    default="strict",
    show_default=True,
    help="strict: float32 is float32, GELU is exact. fast: the device's shortcuts, HF32 or TF32; the CPU has none.",
)
graph_option = click.option(
    "--graph",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    callback=lambda _context, _parameter, value: {"auto": "auto", "on": True, "off": False}[value],
    help="Replay captured graphs on an accelerator: where that works and is faster, always, or never.",
)
fallback_option = click.option(
    "--allow-fallback",
    is_flag=True,
    help="Run operators that the device has no kernel for on the CPU, and say so, in place of an error.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _be_quiet(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    context.meta[QUIET] = value


quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_be_quiet,
    help="Print no progress on stderr, only errors.",
)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """--device, --numerics, --graph and --allow-fallback, which the command passes on to `load`.

    On the CPU there are no graphs, so `--graph on` is refused; there are no shortcuts, so that both numerics are one;
    and everything runs on it, with or without --allow-fallback.
    """

    @functools.wraps(command)
    def prepared(*arguments: object, **options: Any) -> None:
        device = parse_device(options["device"])
        if options["graph"] is True:
            require_accelerator(device)
        if device.kind == "npu" and not options["allow_fallback"]:
            # torch_npu reads it once. A library leaves the process's environment alone; this process is ours.
            os.environ.setdefault("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
        command(*arguments, **options)

    for option in (fallback_option, graph_option, numerics_option, device_option):
        prepared = option(prepared)
    return prepared


def parse_callers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`1,2,4` as numbers of callers, each once; None where the option was not given."""
    numbers = parse_batches(context, parameter, value)
    if numbers is not None and not all(1 <= number <= MOST_CALLERS for number in numbers):
        raise click.BadParameter(f"expected numbers from 1 to {MOST_CALLERS}, got {value!r}", context, parameter)
    return None if numbers is None else tuple(dict.fromkeys(numbers))


def parse_batches(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`1,4,8` as numbers; None where the option was not given."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected whole numbers such as 1,4,8, got {value!r}", context, parameter)
    return tuple(int(part) for part in parts)


def parse_seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds of a measurement; None where the option was not given."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:
        raise click.BadParameter(f"expected seconds from 0.1 to a day, 86400, got {value!r}", context, parameter)
    return seconds
