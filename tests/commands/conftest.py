"""Fixtures of the command lines: in this process where a process is not the point, and in many that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest

import npu_export.cli
import npu_runtime.cli
from npu_export.pipeline import export
from npu_runtime.cli.console import run_command as run_click_command

SERVER = Path(__file__).parent / "export_server.py"
PROGRAMS: dict[str, click.Command] = {"npu-export": npu_export.cli.command, "npu-runtime": npu_runtime.cli.command}


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Run a command line in this process, as its script does."""
    before = {ending: signal.getsignal(ending) for ending in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)

    def run(program: str, *arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_click_command(PROGRAMS[program], program)
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    yield run
    for ending, handler in before.items():
        signal.signal(ending, handler)
    for name in set(os.environ) - set(environment):  # what a command sets for its own process
        del os.environ[name]


@pytest.fixture(scope="session")
def random_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder with random weights of seed 5, batch 1. Not to be changed."""
    return export("tiny-vit", weights="random:5", output=tmp_path_factory.mktemp("random") / "tiny-random")


class ExportServer:
    """A process that forks exports; see export_server.py."""

    def __init__(self, prefix: tuple[str, ...], scratch: Path) -> None:
        self._scratch = scratch
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(
        self,
        *arguments: str | Path,
        signal: int | None = None,
        after: str = "",
        delay_s: float = 0,
        hold_s: float = 0,
        slow_renames_s: float = 0,
        largest_file: int | None = None,
        check_disk: bool = True,
    ) -> Result:
        """An export; the signal is sent `delay_s` after its stderr holds `after`, where it waits `hold_s`."""
        request = {
            "arguments": ["--model", "tiny-vit", *map(str, arguments)],
            "stdout": str(self._scratch / "stdout"),
            "stderr": str(self._scratch / "stderr"),
            "signal": signal,
            "after": after,
            "delay_s": delay_s,
            "hold_s": hold_s,
            "slow_renames_s": slow_renames_s,
            "largest_file": largest_file,
            "check_disk": check_disk,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for name in ("stdout", "stderr"):
            (self._scratch / name).unlink(missing_ok=True)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the export server died"
        return Result(
            json.loads(answer),
            (self._scratch / "stdout").read_text("utf-8"),
            (self._scratch / "stderr").read_text("utf-8"),
        )

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def start_exports(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., AbstractContextManager[ExportServer]]:
    """An export server, started by a command such as unshare where one is given."""

    @contextmanager
    def start(*prefix: str) -> Iterator[ExportServer]:
        server = ExportServer(prefix, tmp_path_factory.mktemp("server"))
        try:
            yield server
        finally:
            server.close()

    return start


@pytest.fixture(scope="session")
def exports(start_exports: Callable[..., AbstractContextManager[ExportServer]]) -> Iterator[ExportServer]:
    """The export server that most tests share."""
    with start_exports() as server:
        yield server


@pytest.fixture
def perturb_onnx() -> Callable[[Path], None]:
    """Change one weight of the ONNX programs of an artifact by 1 %, in place."""

    def perturb(artifact: Path) -> None:
        graph = onnx.load(str(artifact / "model.b1.onnx"), load_external_data=False).graph
        tensor = next(t for t in graph.initializer if t.external_data)
        place = {entry.key: entry.value for entry in tensor.external_data}
        with (artifact / place["location"]).open("r+b") as file:
            file.seek(int(place["offset"]))
            values = np.frombuffer(file.read(int(place["length"])), np.float32) * np.float32(1.01)
            file.seek(int(place["offset"]))
            file.write(values.tobytes())

    return perturb
