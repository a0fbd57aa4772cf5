"""An export that is killed, interrupted or out of room leaves no artifact, or a whole one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny

from npu_runtime.artifact.store import open_artifact

if TYPE_CHECKING:
    from conftest import ExportServer

LEFTOVER = re.compile(r"\.a\.(partial|replaced)-[0-9a-f]{8}")


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def digest_of_whole(artifact: Path) -> str:
    """The digest of an artifact whose every file is as recorded."""
    opened = open_artifact(artifact)
    opened.check_files()
    return opened.digest


def test_an_export_killed_at_any_moment_leaves_no_artifact_or_a_whole_one(
    exports: ExportServer, tmp_path: Path
) -> None:
    output, finished = tmp_path / "a", tmp_path / "finished"
    finished.mkdir()
    moments = random.Random(0)
    killed, left = 0, 0
    for format in ("torchscript", "onnx"):
        for step in ("plan the keys", "load the weights", "record the reference", f"freeze {format}", "the manifest"):
            result = exports.run(
                *("--weights", "random:1", "--format", format, "--output", output),
                signal=signal.SIGKILL,
                after=step,
                delay_s=moments.uniform(0, 0.1),
            )
            killed += result.code == -signal.SIGKILL
            leftovers = entries(tmp_path) - {"a", "finished"}
            assert len(leftovers) <= 1
            assert all(LEFTOVER.fullmatch(name) for name in leftovers)
            left += len(leftovers)
            if output.exists():
                digest_of_whole(output)
                output.rename(finished / f"{format} {step}")
    assert killed >= 5
    assert left >= 3
    assert exports.run("--weights", "random:1", "--format", "torchscript", "--output", output).code == 0
    assert entries(tmp_path) == {"a", "finished"}
    digest_of_whole(output)


@pytest.mark.parametrize("after", ["load the weights", "freeze onnx, batch 1", "write the manifest"])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_exits_with_130_and_leaves_nothing(
    ending: signal.Signals, after: str, exports: ExportServer, tmp_path: Path
) -> None:
    result = exports.run("--weights", "random:1", "--output", tmp_path / "a", signal=ending, after=after, hold_s=30)
    assert result.code == 130
    assert result.out == ""
    assert result.err.endswith("interrupted\n")
    assert entries(tmp_path) == set()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_packages_are_imported_exits_with_130(ending: signal.Signals, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        tiny.__file__,
        "npu-export",
        "--model",
        "tiny-vit",
        "--weights",
        "random:1",
    ]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "a")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert any("torch." in line for line in process.stderr)
    process.send_signal(ending)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, entries(tmp_path)) == (130, "", set())
    assert err.endswith("interrupted\n")


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_a_package_swallows_ends_the_command_before_its_next_step(ending: str) -> None:
    code = f"""
import os, signal, click
from npu_runtime.cli.console import StepProgress, run_command
@click.command()
def command():
    try:
        os.kill(os.getpid(), signal.{ending})
    except BaseException:
        pass
    with StepProgress().step("the next step"):
        print("it was done")
run_command(command, "command")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "interrupted"


@pytest.mark.parametrize("after", ["record the reference", "rename 1", "rename 2"])
def test_a_kill_while_an_artifact_is_replaced_never_loses_it(after: str, exports: ExportServer, tmp_path: Path) -> None:
    output = tmp_path / "a"
    arguments = ("--format", "torchscript", "--output", output)
    assert exports.run("--weights", "random:1", *arguments).code == 0
    old = digest_of_whole(output)
    killed = exports.run(
        "--weights", "random:2", *arguments, "--force", signal=signal.SIGKILL, after=after, hold_s=30, slow_renames_s=3
    )
    assert killed.code == -signal.SIGKILL
    assert output.exists() == (after != "rename 1")
    refused = exports.run("--weights", "random:3", *arguments)
    assert refused.code == 2
    assert "the output exists" in refused.err
    assert (digest_of_whole(output) == old) == (after != "rename 2")
    assert exports.run("--weights", "random:3", *arguments, "--force").code == 0
    assert open_artifact(output).manifest.provenance.weights.random_seed == 3
    assert entries(tmp_path) == {"a"}


def test_an_interrupt_while_an_artifact_is_replaced_keeps_one_under_its_name(
    exports: ExportServer, tmp_path: Path
) -> None:
    output = tmp_path / "a"
    arguments = ("--format", "torchscript", "--output", output)
    assert exports.run("--weights", "random:1", *arguments).code == 0
    result = exports.run(
        "--weights", "random:2", *arguments, "--force", signal=signal.SIGINT, after="rename 1", slow_renames_s=3
    )
    assert result.code == 130
    digest_of_whole(output)
    assert entries(tmp_path) == {"a"}


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
@pytest.mark.parametrize("largest_file", [1_000, 60_000, 100_000, 400_000])
def test_a_file_that_the_system_refuses_is_one_clear_error_and_leaves_nothing(
    largest_file: int, format: str, exports: ExportServer, tmp_path: Path
) -> None:
    result = exports.run(
        "--weights", "random:1", "--format", format, "--output", tmp_path / "a", "--json", largest_file=largest_file
    )
    assert_disk_full(result.code, result.err, result.json, tmp_path / "a")
    assert entries(tmp_path) == set()


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_a_largest_file_that_suffices_does_no_harm(format: str, exports: ExportServer, tmp_path: Path) -> None:
    result = exports.run(
        "--weights", "random:1", "--format", format, "--output", tmp_path / "a", largest_file=16_000_000
    )
    assert (result.code, entries(tmp_path)) == (0, {"a"})


SIZES_KB = (72, 300)


def test_a_disk_that_fills_during_an_export_is_one_clear_error_and_leaves_nothing(
    start_exports: Callable[..., AbstractContextManager[ExportServer]], tmp_path: Path
) -> None:
    mounts = []
    for size in SIZES_KB:
        (tmp_path / f"{size}").mkdir()
        mounts.append(f"mount -t tmpfs -o size={size}k tmpfs '{tmp_path}/{size}'")
    mount = " && ".join(mounts)
    tried = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {tried.stderr.strip()}")
    with start_exports("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh") as server:
        for size in SIZES_KB:
            # Without the check for room that comes first, as where another program fills the disk.
            for format in ("torchscript", "onnx"):
                output = tmp_path / f"{size}" / "a"
                arguments = ("--weights", "random:1", "--format", format, "--output", output, "--json")
                result = server.run(*arguments, check_disk=False)
                assert_disk_full(result.code, result.err, result.json, output)
                seen = Path(f"/proc/{server.pid}/root{output.parent}")
                assert os.statvfs(seen).f_blocks * os.statvfs(seen).f_frsize == size * 1024
                assert entries(seen) == set()
        checked = server.run("--weights", "random:1", "--output", output, "--json")
        assert (checked.code, checked.json["error"]["what"]) == (1, "the disk has too little room for the artifact")
        assert "load the weights" not in checked.err


def assert_disk_full(code: int, err: str, answer: dict[str, dict[str, str]], output: Path) -> None:
    assert code == 1, err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert answer["error"]["what"] == "the disk takes no more bytes"
    assert answer["error"]["where"] == str(output)
    assert re.search(r"No space left on device|File too large", answer["error"]["got"])
    assert "--output" in answer["error"]["next"]
