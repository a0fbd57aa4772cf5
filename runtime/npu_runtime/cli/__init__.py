"""The command npu-runtime: one module a subcommand, imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import click

from npu_runtime import __version__
from npu_runtime.cli.console import run_command

COMMANDS = {
    "inspect": "What is in an artifact.",
    "verify": "Hashes, then parity against the stored reference, on this device.",
    "parity": "Step by step from eager to the device, on seeds and images; names what is to blame.",
    "show": "What a record says, and how it differs from another.",
    "bench": "Latency of eager and exported, side by side.",
    "report": "Records as one HTML page and Markdown, in English or Chinese.",
    "embed": "Features of image files.",
    "pack": "An artifact as a Triton model repository.",
    "doctor": "What this machine can run, and what to do about the rest.",
}
"""Subcommand -> its line in the help; `npu_runtime.cli.NAME` defines it."""


class _Commands(click.Group):
    """Subcommands that are imported when they are run, so that `--help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"npu_runtime.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="npu-runtime")
def command(**_: Any) -> None:
    """Run, check and measure the artifacts that npu-export writes.

    Results go to stdout, progress to stderr, where --quiet leaves errors alone; --json gives the result as data.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 parity failed, 4 device or dependency missing,
    130 interrupted.
    """


def main() -> None:
    run_command(command, "npu-runtime")
