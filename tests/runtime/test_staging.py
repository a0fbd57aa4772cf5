from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.artifact.staging import check_output, stage
from npu_runtime.errors import Error, UsageError

ARTIFACT = '{"schema": "1.0", "encoder": "old", "programs": [], "files": []}'


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_artifact(folder: Path, text: str = ARTIFACT) -> Path:
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(text)
    return folder


def put(final: Path, *, force: bool = False) -> None:
    with stage(final, force=force) as folder:
        (folder / "new").write_text("new")


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with stage(final) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("whole")
        assert folder.parent == tmp_path
        assert not final.exists()
    assert names(tmp_path) == ["out"]
    assert (final / "inner" / "file").read_text() == "whole"


def test_folders_above_the_output_are_made(tmp_path: Path) -> None:
    put(tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == ["out"]


def test_a_relative_output_lies_in_the_folder_that_was_current_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with stage(Path("out")):
        monkeypatch.chdir("elsewhere")
    assert names(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:

    def fail() -> None:
        with stage(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise kind

    with pytest.raises(kind):
        fail()
    assert names(tmp_path) == []


def test_an_exception_leaves_the_artifact_that_was_to_be_replaced(tmp_path: Path) -> None:
    final = write_artifact(tmp_path / "out")
    with pytest.raises(ValueError, match="no"), stage(final, force=True):
        raise ValueError("no")
    assert names(tmp_path) == ["out"]
    assert (final / MANIFEST_NAME).read_text() == ARTIFACT


@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_between_the_renames_puts_the_old_artifact_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    final = write_artifact(tmp_path / "out")
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(final, force=True)
    assert names(tmp_path) == ["out"]
    assert (final / MANIFEST_NAME).read_text() == ARTIFACT


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_no_more_bytes_is_said_so(tmp_path: Path, number: int) -> None:
    with pytest.raises(Error, match="the disk takes no more bytes") as caught, stage(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert caught.value.where == str(tmp_path / "out")
    assert names(tmp_path) == []


def test_another_error_of_the_system_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), stage(tmp_path / "out"):
        raise PermissionError
    assert names(tmp_path) == []


def test_an_output_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(Error, match="the output cannot be written") as caught:
        put(tmp_path / "file" / "out")
    assert caught.value.where == str(tmp_path / "file" / "out")


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    final = write_artifact(tmp_path / "out")
    entered = False
    with pytest.raises(UsageError, match="the output exists") as caught, stage(final):
        entered = True
    assert not entered
    assert "--force" in str(caught.value.hint)
    assert names(final) == [MANIFEST_NAME]
    assert names(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(UsageError, match="the output exists"), stage(final):
        write_artifact(final)
    assert names(tmp_path) == ["out"]
    assert names(final) == [MANIFEST_NAME]


def test_force_replaces_an_artifact_whole(tmp_path: Path) -> None:
    final = write_artifact(tmp_path / "out")
    with stage(final, force=True) as folder:
        (folder / "new").write_text("new")
        assert names(final) == [MANIFEST_NAME]
    assert names(final) == ["new"]
    assert names(tmp_path) == ["out"]


def test_force_replaces_an_artifact_of_another_version(tmp_path: Path) -> None:
    final = write_artifact(tmp_path / "out", '{"schema": "7.0", "encoder": 1, "programs": 2, "files": [], "more": 3}')
    put(final, force=True)
    assert names(final) == ["new"]


def test_force_replaces_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    put(tmp_path / "out", force=True)
    assert names(tmp_path / "out") == ["new"]


def test_force_makes_an_output_that_does_not_exist(tmp_path: Path) -> None:
    put(tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"name": "a web page", "icons": []}'])
def test_force_refuses_a_folder_that_is_no_artifact(tmp_path: Path, manifest: str | None) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (final / MANIFEST_NAME).write_text(manifest)
    before = names(final)
    with pytest.raises(UsageError, match="is not just an artifact"):
        put(final, force=True)
    assert names(final) == before
    assert names(tmp_path) == ["out"]


def test_force_refuses_an_artifact_with_a_file_of_somebody_else(tmp_path: Path) -> None:
    listed = ARTIFACT.replace('"files": []', '"files": [{"file": "model.ts"}]')
    final = write_artifact(tmp_path / "out", listed)
    (final / "model.ts").write_text("program")
    (final / "notes").mkdir()
    (final / "notes" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not just an artifact") as caught:
        put(final, force=True)
    assert caught.value.got == "notes/thesis.tex"
    assert names(final) == [MANIFEST_NAME, "model.ts", "notes"]
    (final / "notes" / "thesis.tex").unlink()
    put(final, force=True)
    assert names(final) == ["new"]


def test_force_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="is not just an artifact"):
        put(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("dangling", [False, True])
def test_force_refuses_a_link(tmp_path: Path, dangling: bool) -> None:
    target = tmp_path / "target"
    if not dangling:
        write_artifact(target)
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(UsageError, match="is not just an artifact"):
        put(tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()
    assert target.exists() is not dangling


def test_a_dangling_link_is_an_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "absent")
    with pytest.raises(UsageError, match="the output exists"):
        check_output(tmp_path / "out", force=False)
    check_output(tmp_path / "free", force=False)


@pytest.fixture
def start_stage() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """A process that is in the middle of `stage`; it ends when it reads a line."""
    code = """
import sys
from pathlib import Path
from npu_runtime.artifact.staging import stage
with stage(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder.name, flush=True)
    sys.stdin.readline()
"""
    started = []

    def start(final: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(final)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_run_is_cleaned_by_the_next_and_a_living_one_is_kept(
    tmp_path: Path, start_stage: Callable[[Path], subprocess.Popen[str]]
) -> None:
    final = tmp_path / "out"
    process = start_stage(final)
    assert process.stdout is not None
    partial = process.stdout.readline().strip()
    assert partial.startswith(".out.partial-")

    with pytest.raises(ValueError, match="stop"), stage(final):
        raise ValueError("stop")
    assert names(tmp_path) == [partial]
    assert names(tmp_path / partial) == ["half"]

    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names(tmp_path) == [partial]
    put(final)
    assert names(tmp_path) == ["out"]


def test_of_two_runs_for_one_output_the_first_to_end_wins(
    tmp_path: Path, start_stage: Callable[[Path], subprocess.Popen[str]]
) -> None:
    final = tmp_path / "out"
    process = start_stage(final)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(UsageError, match="the output exists"), stage(final):
        process.communicate("\n")
    assert process.returncode == 0
    assert names(tmp_path) == ["out"]
    assert names(final) == ["half"]


def test_an_artifact_that_a_killed_run_was_replacing_is_put_back(tmp_path: Path) -> None:
    write_artifact(tmp_path / ".out.replaced-01234567")
    with pytest.raises(UsageError, match="the output exists"):
        put(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / MANIFEST_NAME).read_text() == ARTIFACT


def test_an_artifact_that_a_killed_run_has_replaced_is_removed(tmp_path: Path) -> None:
    write_artifact(tmp_path / ".out.replaced-01234567")
    final = write_artifact(tmp_path / "out", ARTIFACT.replace("old", "current"))
    with pytest.raises(UsageError, match="the output exists"):
        put(final)
    assert names(tmp_path) == ["out"]
    assert "current" in (final / MANIFEST_NAME).read_text()


@pytest.mark.parametrize(
    ("output", "other"),
    [
        ("out", ".other.partial-01234567"),
        ("out", ".other.replaced-01234567"),
        ("out", ".outer.partial-01234567"),
        ("out", ".out.more.partial-01234567"),
        ("out", ".out.partial-b.partial-01234567"),
        ("out", ".out.partial-backup"),
        ("out", ".out.partial"),
        ("out", "out.partial-01234567"),
        ("*", ".a.partial-01234567"),
        ("*", ".a.replaced-01234567"),
        ("a.b", ".axb.partial-01234567"),
    ],
)
def test_what_belongs_to_other_outputs_is_left_alone(tmp_path: Path, output: str, other: str) -> None:
    write_artifact(tmp_path / other)
    put(tmp_path / output)
    assert names(tmp_path) == sorted([output, other])


@pytest.mark.parametrize("output", ["out", "vit[1]", "*", "a.b", "ä b"])
def test_leftovers_of_an_output_with_any_name_are_cleaned(tmp_path: Path, output: str) -> None:
    write_artifact(tmp_path / f".{output}.partial-01234567")
    put(tmp_path / output)
    assert names(tmp_path) == [output]


def test_a_file_or_link_named_like_a_leftover_is_left_alone(tmp_path: Path) -> None:
    precious = write_artifact(tmp_path / "precious")
    (tmp_path / ".out.partial-01234567").write_text("a file")
    (tmp_path / ".out.replaced-01234567").symlink_to(precious)
    put(tmp_path / "out")
    assert names(tmp_path) == [".out.partial-01234567", ".out.replaced-01234567", "out", "precious"]
    assert names(precious) == [MANIFEST_NAME]
