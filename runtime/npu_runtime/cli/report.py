"""npu-runtime report: records as a report for people."""

from __future__ import annotations

from pathlib import Path

import click

from npu_runtime.artifact.staging import check_new_file, write_file
from npu_runtime.cli.console import StepProgress, print_json, print_line
from npu_runtime.cli.options import json_option, quiet_option
from npu_runtime.errors import UnavailableError, UsageError
from npu_runtime.report.compose import compose
from npu_runtime.report.html import write_html
from npu_runtime.report.markdown import write_markdown
from npu_runtime.report.messages import LANGUAGES, Say
from npu_runtime.report.subjects import read_subjects

NEEDED = ("jinja2", "matplotlib")


@click.command()
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECORD…")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    metavar="FILE",
    help="The page, which needs neither a network nor another file.",
)
@click.option(
    "--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Write its text and tables as Markdown as well."
)
@click.option(
    "--lang", "language", type=click.Choice(list(LANGUAGES)), default="en", show_default=True, help="Its language."
)
@click.option("--force", is_flag=True, help="Replace the files of --output and --markdown.")
@json_option
@quiet_option
def command(
    records: tuple[Path, ...], output: Path, markdown: Path | None, language: str, force: bool, as_json: bool
) -> None:
    """Make a report of records: what was exported, on what it ran, how exact and how fast.

    RECORD is a file that parity, verify or bench wrote, or an artifact (its folder or its manifest.json), which tells
    of the export. Records of several artifacts make one report, a part for each. Nothing stands in it that no record
    holds; what was not measured says so.

    The exit code is 0 whatever the records' verdicts are.
    """
    files = [output, *([] if markdown is None else [markdown])]
    for file in files:
        check_new_file(file, force=force)
    if markdown is not None and markdown.absolute() == output.absolute():
        raise UsageError("--output and --markdown name one file", where=output)
    subjects = read_subjects(records)
    say = Say(language)
    try:
        with StepProgress().step(f"report of {len(subjects)} artifact{'s' if len(subjects) > 1 else ''}"):
            report = compose(subjects, language)
            page = write_html(report, say)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in NEEDED:
            raise
        raise UnavailableError(
            f"a report needs the package {error.name}, which is not installed", hint="pip install 'npu-export[report]'"
        ) from error
    write_file(output, page.encode())
    if markdown is not None:
        write_file(markdown, write_markdown(report, say).encode())
    if as_json:
        artifacts = [
            {
                "digest": subject.digest,
                "encoder": subject.encoder,
                "precision": subject.precision,
                "manifest": subject.manifest_path,
                "records": [given.path for given in subject.records],
            }
            for subject in subjects
        ]
        written = {"page": str(output), "markdown": None if markdown is None else str(markdown)}
        return print_json({"record": "report", **written, "language": language, "artifacts": artifacts})
    for subject in subjects:
        count = len(subject.records)
        told = "" if subject.manifest is not None else ", manifest not given"
        print_line(f"of        {subject.encoder} {subject.precision}: {count} record{'' if count == 1 else 's'}{told}")
    for file in files:
        print_line(f"written   {file}")
