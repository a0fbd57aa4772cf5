from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import npu_export.provenance as provenance


def test_outside_a_checkout_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "provenance.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.project_revision() is None


def test_an_installed_copy_inside_somebody_elses_checkout_has_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tmp_path, "theirs.py")
    (tmp_path / "provenance.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.project_revision() is None


def test_in_a_checkout_the_revision_says_whether_there_were_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = commit(tmp_path, "provenance.py")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.project_revision() == revision
    (tmp_path / "provenance.py").write_text("changed")
    assert provenance.project_revision() == f"{revision}-dirty"


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.project_revision() is None


def commit(folder: Path, name: str) -> str:
    """Make a repository with one file in one commit; returns the revision."""
    (folder / name).touch()
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", name], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True, timeout=60)
    return subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
