"""What commands tell on stderr while they run: on a terminal, in a log and under --quiet."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from watching import Watching

import npu_runtime
from npu_export.pipeline import export
from npu_runtime.artifact.store import open_artifact
from npu_runtime.cli import COMMANDS
from npu_runtime.cli.console import StepProgress
from npu_runtime.cli.progress import Count, spell_seconds
from npu_runtime.parity.inputs import DEFAULT_SEEDS, Inputs, seeded_inputs
from npu_runtime.parity.ladder import Ladder, plan_ladder
from npu_runtime.parity.verify import measure_parity

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
COUNTING = """
import sys, time
import npu_runtime.cli.progress as progress
from npu_runtime.cli.console import StepProgress
progress.FIRST_WORD_S = 0.2
steps = StepProgress()
with steps.step("hash the files"):
    advance = steps.count(4_000_000, "bytes")
    for _ in range(4):
        time.sleep(0.3)
        advance(1_000_000)
"""


def on_terminal(command: list[str], width: int = 100, **settings: str) -> str:
    """What a command that ends well writes to a terminal of this width; its stdout goes nowhere."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    }
    environment = {**inherited, "TERM": "xterm-256color", **settings}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=there, stdin=there, env=environment)
    os.close(there)
    written = b""
    while True:
        try:
            part = os.read(here, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            part = b""
        if not part:
            break
        written += part
    os.close(here)
    text = written.decode("utf-8")
    assert process.wait() == 0, text
    return text


def in_log(code: str, **settings: str) -> str:
    """What the code writes to a pipe."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **settings}, check=True
    )
    assert done.stdout == ""
    return done.stderr


def shown(text: str) -> list[str]:
    """The lines that a terminal shows one after the other."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPE.sub("", text)) if line.strip()]


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_a_terminal_shows_a_bar_with_the_rate_and_the_time_left_and_then_one_line() -> None:
    lines = shown(on_terminal([sys.executable, "-c", COUNTING]))
    assert any(re.fullmatch(r". hash the files ━+ 0\.00 of 4\.00 MB after 0 s", line) for line in lines)
    bars = [line for line in lines if re.search(r"━ [123]\.00 of 4\.00 MB, [123]\.\d\d MB/s, \d s left$", line)]
    assert len(bars) >= 3
    assert re.fullmatch(r"✓ hash the files {30} +\d\.\d s   4\.00 MB, [123]\.\d\d MB/s", lines[-1])
    assert len({line[0] for line in bars}) > 1, "the spinner turns"


def test_calls_of_a_benchmark_are_a_bar_on_a_terminal(tiny_artifact: Path) -> None:
    command = ["npu-runtime", "bench", str(tiny_artifact), "--backend", "onnx", "--batch", "1", "--iterations", "60"]
    lines = shown(on_terminal([sys.executable, tiny.__file__, *command]))
    assert any(re.search(r"measure ━+╸?╺?━* \d+ of 65 images, [\d.,]+ images/s, \d s left$", line) for line in lines)
    assert re.fullmatch(r"✓ measure +\d+\.\d s   65 images, [\d.]+ images/s", lines[-1])


@pytest.mark.parametrize("width", [16, 30, 80, 200])
def test_a_line_that_runs_fits_the_terminal(width: int) -> None:
    lines = shown(on_terminal([sys.executable, "-c", COUNTING], width))
    assert max(map(len, lines[:-1])) <= width
    assert any(("━" in line) == (width > 30) and " of " in line for line in lines[:-1])


def test_a_terminal_that_cannot_move_its_cursor_is_a_log() -> None:
    text = on_terminal([sys.executable, "-c", COUNTING], TERM="dumb")
    assert "\x1b" not in text
    assert [line[0] for line in shown(text)] == ["…", "…", "✓"]


def test_no_color_leaves_the_bar_without_colours() -> None:
    text = on_terminal([sys.executable, "-c", COUNTING], NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", text)
    assert "━" in text


@pytest.mark.parametrize("settings", [{}, {"CI": "true", "COLUMNS": "20", "TERM": "xterm-256color"}])
def test_a_log_holds_whole_plain_lines(settings: dict[str, str]) -> None:
    text = in_log(COUNTING, **settings)
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.endswith("\n")
    first, second, last = text.splitlines()
    assert re.fullmatch(r"… hash the files {30} +0\.\d s   0\.00 of 4\.00 MB after 0 s", first)
    assert re.fullmatch(r"… hash the files {30} +\d\.\d s   [123]\.00 of 4\.00 MB, \d\.\d\d MB/s, \d s left", second)
    assert re.fullmatch(r"✓ hash the files {30} +\d\.\d s   4\.00 MB, \d\.\d\d MB/s", last)


def test_colours_that_were_asked_for_in_a_log_move_no_cursor() -> None:
    text = in_log(COUNTING, FORCE_COLOR="1")
    assert set(ESCAPE.findall(text)) <= {match for match in ESCAPE.findall(text) if match.endswith("m")}
    assert "\r" not in text


def test_a_log_is_told_ever_more_rarely_that_a_step_still_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npu_runtime.cli.progress.FIRST_WORD_S", 0.05)
    monkeypatch.setattr("npu_runtime.cli.progress.RAREST_WORD_S", 0.2)
    with StepProgress().step("freeze onnx, batch 1"):
        time.sleep(0.9)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:22] for line in lines] == ["… freeze onnx, batch 1"] * (len(lines) - 1) + ["✓ freeze onnx, batch 1"]
    assert 4 <= len(lines) <= 7  # after 0.05, 0.15, 0.35, 0.55 and 0.75 s, and at the end


def test_a_quick_step_is_one_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    steps = StepProgress()
    with steps.step("hash the files"):
        steps.count(2, "images")(2)
        steps.detail("as recorded")
    assert re.fullmatch(r"✓ hash the files {30} +0\.0 s   as recorded\n", capsys.readouterr().err)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_fails_says_so_and_how_far_it_came_and_leaves_no_thread(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    before = running()
    steps = StepProgress()

    def fail() -> None:
        with steps.step("run onnx"):
            steps.count(8, "images")(3)
            raise error

    with pytest.raises(error):
        fail()
    assert running() == before
    assert re.fullmatch(r"✗ run onnx +0\.0 s   3 of 8 images\n", capsys.readouterr().err)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_interrupted_step_ends_its_process_at_once(terminal: bool) -> None:
    code = (
        "import time, click\nfrom npu_runtime.cli.console import StepProgress, run_command\n"
        "@click.command()\ndef command():\n"
        "    with StepProgress().step('a long step'):\n"
        "        print('begun', flush=True)\n        time.sleep(60)\n"
        "run_command(command, 'command')"
    )
    here, there = pty.openpty()
    stderr = there if terminal else subprocess.PIPE
    settings = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=stderr, stdout=subprocess.DEVNULL, env=settings)
    os.close(there)
    reading = here if terminal else process.stderr.fileno()  # type: ignore[union-attr]
    text = b""
    while re.search(rb"begun\r?\n", text) is None:  # its line's end is written apart
        text += os.read(reading, 1 << 16)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    try:
        while part := os.read(reading, 1 << 16):
            text += part
    except OSError:
        pass
    assert (process.wait(), time.monotonic() - start < 10) == (130, True)
    told = shown(text.decode("utf-8"))
    assert (told[-2][:13], told[-1]) == ("✗ a long step", "interrupted")
    os.close(here)
    if process.stderr is not None:
        process.stderr.close()


def test_what_packages_print_while_a_step_runs_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with StepProgress().step("import"):
        print("hello from a package")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hello from a package\n✓ import")


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_keeps_the_result_and_nothing_that_packages_say(quiet: bool) -> None:
    code = """
import logging, sys, warnings, click
from npu_runtime.cli.console import StepProgress, print_line, run_command
from npu_runtime.cli.options import quiet_option
@click.command()
@quiet_option
def command():
    with StepProgress().step("import"):
        print("hello from a package")
        print("on stderr", file=sys.stderr)
        warnings.warn("a warning of a package")
        logging.getLogger("package").warning("a log of a package")
    print_line("the result")
run_command(command, "command")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *(["--quiet"] if quiet else [])], capture_output=True, text=True, check=True
    )
    assert done.stdout == "the result\n"
    told = ("hello from a package", "on stderr", "a warning of a package", "a log of a package", "✓ import")
    assert [text in done.stderr for text in told] == [not quiet] * 5
    assert done.stderr == "" or not quiet


@pytest.fixture
def parity_record(call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path) -> Path:
    file = tmp_path / "record.json"
    file.write_text(call("npu-runtime", "verify", tiny_artifact, "--json").out, "utf-8")
    return file


def test_every_command_takes_quiet_and_says_its_result_alone(
    call: Callable[..., Any], tiny_artifact: Path, parity_record: Path, photographs: Path, tmp_path: Path
) -> None:
    arguments: dict[str, tuple[str | Path, ...]] = {
        "show": (parity_record,),
        "bench": (tiny_artifact, "--iterations", "2", "--warmup", "1", "--cold", "--backend", "onnx"),
        "pack": (tiny_artifact, "--for", "triton", "--output", tmp_path / "models"),
        "embed": (tiny_artifact, photographs / "coffee.jpg", "--output", tmp_path / "f.npy"),
        "report": (parity_record, "--output", tmp_path / "report.html"),
        "doctor": (),
    }
    for name in COMMANDS:
        loud, quiet = (
            call("npu-runtime", name, *arguments.get(name, (tiny_artifact,)), *more, *force)
            for more, force in (((), ()), (("--quiet",), ("--force",) if name in ("embed", "pack", "report") else ()))
        )
        assert (quiet.code, quiet.err) == (0, ""), name
        assert len(quiet.out.splitlines()) >= len(loud.out.splitlines()) - 1, name
        assert bool(loud.err) == (name not in ("inspect", "show")), name


def test_a_quiet_export_writes_nothing_to_stderr(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    arguments = ("--model", "tiny-vit", "--weights", "random:1", "--probes", "--output", tmp_path / "a", "-q", "--json")
    done = run_command("npu-export", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"artifact"' in done.stdout
    again = run_command("npu-export", *arguments)
    assert again.returncode == 2
    assert again.stderr.startswith("error: the output exists")


def test_a_quiet_command_that_fails_says_why(
    call: Callable[..., Any], artifact_copy: Path, perturb_onnx: Callable[[Path], None], rewrite: Callable[..., None]
) -> None:
    perturb_onnx(artifact_copy)
    damaged = call("npu-runtime", "verify", artifact_copy, "--quiet")
    assert (damaged.code, damaged.err.startswith("error: a file of the artifact has changed")) == (1, True)
    rewrite(artifact_copy)
    wrong = call("npu-runtime", "verify", artifact_copy, "--quiet")
    assert (wrong.code, wrong.err.startswith("error: a program is farther from the reference")) == (3, True)
    assert "✓" not in wrong.err


def test_an_export_counts_to_the_end_of_each_step(tiny_checkpoint: Path, tmp_path: Path) -> None:
    watch = Watching()
    export("tiny-vit", weights=str(tiny_checkpoint), batch=(1, 4), probes=True, output=tmp_path / "a", steps=watch)
    watch.assert_all_done()
    counted = {(count.step, count.unit) for count in watch.counts}
    assert counted == {
        ("load the weights", "bytes"),
        ("record the reference", "images"),
        ("hash the files and write the manifest", "bytes"),
        *((f"check parity of {format}", "images") for format in ("torchscript", "onnx")),
        *((f"find the blocks in {format}", "passes") for format in ("torchscript", "onnx")),
    }
    loaded = next(count for count in watch.counts if count.step == "load the weights")
    assert loaded.total == 4 * open_artifact(tmp_path / "a").manifest.provenance.weights.coverage.parameters
    assert watch.steps[-1] == "bring the files to the disk"


def test_checks_of_an_artifact_count_bytes_and_images(tiny_artifact: Path, photographs: Path) -> None:
    artifact, watch = open_artifact(tiny_artifact), Watching()
    for _ in range(2):  # the second time every file is known
        artifact.check_files(watch=watch)
    list(measure_parity(artifact, backend="onnx", watch=watch))
    inputs = Inputs(seeded_inputs(DEFAULT_SEEDS, artifact.manifest.inputs[0]), watch)
    Ladder(artifact, inputs, watch=watch, batch=4).climb(plan_ladder(artifact.manifest, "cpu"))
    with npu_runtime.load(artifact) as encoder:
        encoder.embed([photographs / "coffee.jpg"] * 6, advance=watch.count(6, "images"))
    watch.assert_all_done()
    nbytes = sum(record.nbytes for record in artifact.manifest.files)
    assert [(count.total, count.unit) for count in watch.counts] == [
        *[(nbytes, "bytes")] * 2,
        *[(4, "images")] * 2,  # a file of each batch size
        (5, "images"),
        (4, "images"),  # of the stored reference
        *[(5, "images")] * 2,
        (6, "images"),
    ]
    assert watch.counts[-1].told == [4, 2]


def at(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_runtime.cli.progress.time.monotonic", lambda: seconds)


def test_the_rate_follows_a_change_and_the_time_left_runs_between_two(monkeypatch: pytest.MonkeyPatch) -> None:
    at(0, monkeypatch)
    count = Count(1000, "rounds")
    assert (count.rate(), count.left_s(), str(count)) == (None, None, "0 of 1,000 rounds after 0 s")
    for second in range(1, 101):
        at(second, monkeypatch)
        count.advance(2)
    assert (count.rate(), count.left_s(), str(count)) == (2, 400, "200 of 1,000 rounds, 2.00 rounds/s, 6 min 40 s left")
    for second in range(101, 141):
        at(second, monkeypatch)
        count.advance(1)
    assert (count.rate(), count.left_s()) == (1, 760)
    at(140.5, monkeypatch)
    assert count.left_s() == 759.5
    at(200, monkeypatch)
    assert count.left_s() == 759, "no less than all that are left but the next"


def test_units_that_take_longer_than_the_window_have_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    at(0, monkeypatch)
    count = Count(10, "rounds")
    for index in (1, 2, 3):
        at(90 * index, monkeypatch)
        count.advance(1)
        assert count.left_s() == pytest.approx(90 * (10 - index))


def test_what_threads_tell_adds_up_and_what_comes_late_counts_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    steps = StepProgress()
    with steps.step("hash"):
        late = steps.count(40_000, "images")
        threads = [threading.Thread(target=lambda: [late(1) for _ in range(10_000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with steps.step("next"):
        steps.count(5, "images")(2)
        late(1)
    first, second = capsys.readouterr().err.splitlines()
    assert "   40,000 images, " in first
    assert second.endswith("   2 of 5 images")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_seconds_are_told_as_people_say_them(seconds: float, told: str) -> None:
    assert spell_seconds(seconds) == told
