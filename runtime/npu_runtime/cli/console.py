"""What both commands share: results on stdout, narration on stderr, errors as one message and a code."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from npu_runtime.artifact.schema import Manifest, Preprocessing
from npu_runtime.backends.base import SessionReport
from npu_runtime.cli.progress import NAME_WIDTH, Count, RunningLine, told_now_and_then
from npu_runtime.errors import Error, UnavailableError
from npu_runtime.steps import Advance, unwatched

WIDEST_TABLE = 1000
"""Characters, more than any row has."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, 128 + SIGINT, as shells expect."""
QUIET = "npu_runtime.quiet"
"""Where click's context keeps whether --quiet was given."""


_interrupted = threading.Event()
"""Set by a signal: packages that are being imported may swallow its exception, and the next step must not begin."""


def narration() -> Console:
    """The console for progress and errors."""
    # The stream of now: while packages print, theirs is another.
    return Console(file=sys.stderr, stderr=True, highlight=False, soft_wrap=True)


def print_json(document: object) -> None:
    """A result as indented JSON on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """A result as a table on stdout; the first `left` columns are text, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # No column is cut: on a narrow terminal, in a file or in a pipe, long rows run on.
    width = max(Console().width, Console(width=WIDEST_TABLE).measure(table).maximum)
    Console(highlight=False, width=width).print(table, soft_wrap=True)


def print_line(text: str, *, warn: bool = False) -> None:
    """A line of a result on stdout."""
    Console(highlight=False, soft_wrap=True).print(Text(text, style="bold yellow" if warn else ""))


def print_conditions(reports: Mapping[str, SessionReport]) -> None:
    """The lines on stdout that tell how backends ran on their device, by name; alike ones share a line."""
    alike: dict[str, list[str]] = {}
    for backend, report in reports.items():
        alike.setdefault(_spell_numerics(report), []).append(backend)
    for text, backends in alike.items():
        print_line(f"numerics  {', '.join(backends)}: {text}")
    for backend, report in reports.items():
        for graph in report.graphs:
            told = f"graph replay, {graph.speedup:.2f} x plain calls" if graph.replayed else f"plain: {graph.reason}"
            if graph.max_abs_difference is not None:
                differs = graph.max_abs_difference
                told += f", differs by {differs:.1e}" if differs else ", equal to a plain call bit for bit"
            print_line(f"graph     {backend} batch {graph.batch}: {told}", warn=bool(graph.max_abs_difference))
        if report.fallback is None:
            told = "allowed, and unknown: this version of the library does not tell what runs on the CPU"
            print_line(f"fallback  {backend}: {told}", warn=True)
        elif report.fallback:
            print_line(f"fallback  {backend}: on the CPU, as was allowed: {', '.join(report.fallback)}", warn=True)


def _spell_numerics(report: SessionReport) -> str:
    settings = [f"{n.removeprefix('torch.')} {value}" for n, value in report.numerics.items() if n != "numerics"]
    errors = {} if report.arithmetic is None else report.arithmetic.errors()
    measured = [f"{name} {error:.0e}" for name, error in errors.items()]
    told = f" ({', '.join(settings)})" if settings else ""
    return f"{report.numerics['numerics']}{told}" + (f"; errors here: {', '.join(measured)}" if measured else "")


def spell_nbytes(nbytes: int) -> str:
    """A size as people read it, in units of 1000 bytes."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"


def spell_preprocessing(steps: Preprocessing) -> str:
    """How images are prepared, and by whom, on one line."""
    size = f"{steps.size[0]} x {steps.size[1]}"
    resized = f"shorter side to {steps.shortest_edge}, centre {size}"
    if steps.shortest_edge is None:
        resized = f"squashed to {size}"
    mean, std = ("/".join(f"{value:g}" for value in values) for values in (steps.mean, steps.std))
    told = "" if steps.publisher is None else f"{steps.publisher}: "
    return f"{resized}, {steps.interpolation}, mean {mean}, std {std} ({told}{steps.source})"


def print_weights(manifest: Manifest) -> None:
    """The line that every result repeats: whose weights these are."""
    print_line(f"weights   {manifest.weights_summary()}", warn=manifest.provenance.weights.random_seed is not None)


def print_error(error: Error) -> None:
    """The message of an error on stderr."""
    narration().print(Text.assemble(("error: ", "bold red"), str(error)))


class StepProgress:
    """Steps on stderr, each with its time when it is done; none under --quiet.

    While a step runs, a terminal shows it as a line that moves, with a bar where there is something to count, and a
    log is told now and then. What packages print meanwhile is no result: it goes to stderr, under --quiet nowhere.
    """

    def __init__(self) -> None:
        self._console = narration()
        self._quiet = is_quiet()
        self._chatter = io.StringIO()
        self._line = RunningLine("")
        self._detail = ""

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        self._line, self._detail = RunningLine(name), ""
        sign = ("✗ ", "red")
        try:
            with self._watched():
                yield
            sign = ("✓ ", "green")
        finally:
            self._tell(sign, self._detail or self._line.summary())

    def count(self, total: int, unit: str) -> Advance:
        if total < 2:
            return unwatched
        self._line.counts.append(Count(total, unit))
        return self._line.counts[-1].advance

    def detail(self, text: str) -> None:
        self._detail = text

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        line = self._line
        with contextlib.ExitStack() as stack:
            if self._quiet:
                stack.enter_context(contextlib.redirect_stderr(self._chatter))
                stack.enter_context(contextlib.redirect_stdout(self._chatter))
            elif self._console.file.isatty() and self._console.is_interactive:
                stack.enter_context(Live(line, console=self._console, transient=True, refresh_per_second=8))
            else:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
                stack.enter_context(told_now_and_then(lambda: self._tell(("… ", "cyan"), str(line.count or ""))))
            yield

    def _tell(self, sign: tuple[str, str], text: str) -> None:
        """One whole line, such as that of a step which is done."""
        if not self._quiet:
            line = Text.assemble(sign, f"{self._line.name:<{NAME_WIDTH}}", (f"{self._line.seconds:6.1f} s", "cyan"))
            self._console.print(line.append(f"   {text}" if text else "", "dim"))


def is_quiet() -> bool:
    """Whether --quiet was given to the command that runs."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def run_command(command: click.Command, prog_name: str) -> NoReturn:
    """Run a click command and exit: 0 done, or the code of the error after its message on stderr.

    Where `--json` was asked for, the error is on stdout as data as well.
    """
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is no reason to fail
    try:
        code = command.main(prog_name=prog_name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        _print_error_data({"what": error.format_message()}, error.exit_code)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        narration().print("interrupted", style="yellow")
        code = INTERRUPTED
    except Error as error:
        _show(error)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout went away, as `| head` does
        code = 1
    except ModuleNotFoundError as error:
        missing = UnavailableError(
            f"the package {error.name} is not installed", hint="pip install 'npu-export[export]' has all that is needed"
        )
        _show(missing)
        code = missing.exit_code
    except OSError as error:
        refused = Error("the system refused", where=error.filename, got=error.strerror or error)
        _show(refused)
        code = refused.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(*_: Any) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


def _show(error: Error) -> None:
    print_error(error)
    _print_error_data(error.fields(), error.exit_code)


def _print_error_data(fields: Mapping[str, str], exit_code: int) -> None:
    if "--json" in sys.argv:
        print_json({"error": fields, "exit_code": exit_code})
