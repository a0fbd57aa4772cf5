"""npu-runtime show: what a record says, on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from npu_runtime.bench import record_files as bench
from npu_runtime.bench.against import compare_records
from npu_runtime.bench.records import BenchRecord
from npu_runtime.cli.bench_tables import print_against, print_bench
from npu_runtime.cli.console import print_line
from npu_runtime.cli.options import quiet_option
from npu_runtime.cli.parity_tables import print_differences, print_parity
from npu_runtime.errors import Error, UsageError
from npu_runtime.parity import record_files as parity
from npu_runtime.parity.records import ParityRecord
from npu_runtime.structured import read_record_name, read_record_text

KINDS = (parity.SCHEMA.name, bench.SCHEMA.name)


@click.command()
@click.argument("record", type=click.Path(path_type=Path), metavar="RECORD")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="RECORD",
    help="Another record of its kind, whose figures stand beside these.",
)
@quiet_option
def command(record: Path, against: Path | None) -> None:
    """Print a record that parity, verify or bench wrote, wherever that was.

    The exit code is 0 whatever the record's verdict is. Two records are told apart first: other artifacts,
    devices, numerics, versions or images are listed. Of two bench records the other counts as the older one; as in
    bench nothing is judged where the machine or the settings differ.
    """
    shown = _read(record)
    other = None if against is None else _read(against)
    if other is not None and type(other) is not type(shown):
        raise UsageError(
            "these are records of two kinds, which have no figure in common",
            where=against,
            expected=f"a {_kind(shown)} record, as {record} is",
            got=f"a {_kind(other)} record",
        )
    _print_machine(shown.environment, shown.device)
    if isinstance(shown, BenchRecord):
        print_bench(shown)
        if isinstance(other, BenchRecord):
            print_against(compare_records(other, shown, str(against)))
        return
    print_parity(shown, details=True)
    if isinstance(other, ParityRecord):
        print_line("")
        print_differences(shown, other, str(against))


def _read(path: Path) -> ParityRecord | BenchRecord:
    text = read_record_text(path)
    name = read_record_name(text, str(path))
    if name == bench.SCHEMA.name:
        return bench.decode_record(text, str(path))
    if name == parity.SCHEMA.name:
        return parity.decode_record(text, str(path))
    raise Error(
        "this is no record that show prints",
        where=path,
        expected=" or ".join(f'"record": "{kind}"' for kind in KINDS),
        got=text[:80] if name is None else f'"record": "{name}"',
        hint="pass what npu-runtime parity, verify or bench wrote",
    )


def _kind(record: ParityRecord | BenchRecord) -> str:
    return bench.SCHEMA.name if isinstance(record, BenchRecord) else parity.SCHEMA.name


def _print_machine(environment: Mapping[str, object], device: str) -> None:
    versions = environment.get("versions")
    told = (f"{name} {version}" for name, version in versions.items()) if isinstance(versions, Mapping) else ()
    print_line(f"made on   {', '.join((str(environment.get('processor')), f'device {device}', *told))}")
