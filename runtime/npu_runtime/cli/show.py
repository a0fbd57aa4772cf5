"""npu-runtime show: what a record says, on any machine."""

from __future__ import annotations

from pathlib import Path

import click

from npu_runtime.cli.console import print_line
from npu_runtime.cli.options import quiet_option
from npu_runtime.cli.parity_tables import print_differences, print_parity
from npu_runtime.parity.record_files import read_record


@click.command()
@click.argument("record", type=click.Path(path_type=Path), metavar="RECORD")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="RECORD",
    help="Another record, whose figures stand beside these.",
)
@quiet_option
def command(record: Path, against: Path | None) -> None:
    """Print a record that parity or verify wrote, wherever that was.

    The exit code is 0 whatever the record's verdict is. Two records are told apart first: other artifacts,
    devices, numerics, versions or images are listed before any figure.
    """
    shown = read_record(record)
    other = None if against is None else read_record(against)
    versions = shown.environment.get("versions")
    print_line(f"made on   {shown.environment.get('processor')}, device {shown.device}; {versions}")
    print_parity(shown, details=True)
    if other is not None:
        print_line("")
        print_differences(shown, other, str(against))
