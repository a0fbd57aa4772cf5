"""Exports in processes that a test ends, fills or slows down.

`python export_server.py` reads a JSON request a line and answers each with the process's return code. What
an export imports is imported once and every export is a fork, so that many deaths take seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401 (imported for the forks)

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

import npu_export.pipeline as pipeline
from npu_export import lint, onnx, torchscript  # noqa: F401 (imported for the forks)
from npu_export.cli import main
from npu_export.timm_import import import_timm
from npu_runtime.cli.console import StepProgress


def slow_down_renames(seconds: float) -> None:
    """Print a line to stderr after each rename of a folder, and wait."""
    rename, count = Path.rename, 0

    def slow(self: Path, target: Path) -> Path:
        nonlocal count
        renamed = rename(self, target)
        count += 1
        print(f"rename {count}", file=sys.stderr, flush=True)
        time.sleep(seconds)
        return renamed

    Path.rename = slow  # type: ignore[method-assign, assignment]


def hold_after(text: str, seconds: float) -> None:
    """Wait, for a signal, once a step whose name holds `text` is done."""
    step = StepProgress.step

    @contextlib.contextmanager
    def held(self: StepProgress, name: str) -> Iterator[None]:
        with step(self, name):
            yield
        if text in name:
            time.sleep(seconds)

    StepProgress.step = held  # type: ignore[method-assign, assignment]


def run_export(request: dict[str, Any]) -> None:
    """Be the process of one export; does not return."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if request["slow_renames_s"]:
        slow_down_renames(request["slow_renames_s"])
    if request["hold_s"]:
        hold_after(request["after"], request["hold_s"])
    if not request["check_disk"]:
        pipeline.DISK_MARGIN_NBYTES = -sys.maxsize
    if request["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], request["largest_file"]))
    sys.argv = ["npu-export", *request["arguments"]]
    code = 1
    try:
        main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(process: int, request: dict[str, Any]) -> None:
    """Wait until the export has narrated `after`, then `delay_s`, then send the signal."""
    stderr = Path(request["stderr"])
    while request["after"] not in (stderr.read_text("utf-8") if stderr.exists() else ""):
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    time.sleep(request["delay_s"])
    os.kill(process, request["signal"])


def serve() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tiny.register()
    import_timm()
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            run_export(request)
        if request["signal"] is not None:
            end(process, request)
        _, status = os.waitpid(process, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve()
