"""Arguments and options that several subcommands share."""

from __future__ import annotations

import click

artifact_argument = click.argument("artifact", metavar="ARTIFACT")
device_option = click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to run.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads for one operator.  [default: the backend's choice]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def parse_batches(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`1,4,8` as numbers; None where the option was not given."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected whole numbers such as 1,4,8, got {value!r}", context, parameter)
    return tuple(int(part) for part in parts)
