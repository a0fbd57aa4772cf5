"""The direction of imports, as pyproject.toml's contracts have it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BETWEEN = "the exporter imports the runtime, never back"
INSIDE = "direction inside the runtime"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of both packages and their contracts that a test may change."""
    for package in ("exporter", "runtime"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def broken_contracts(tree: Path) -> set[str]:
    """Names of the contracts that import-linter finds broken in a tree."""
    run = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tree / "exporter"), str(tree / "runtime")))},
        capture_output=True,
        text=True,
    )
    report = re.sub(r"\x1b\[[0-9;]*m", "", run.stdout)  # older import-linters colour it whatever it is written to
    verdicts = {name: f"{name} KEPT" in report for name in (BETWEEN, INSIDE)}
    assert all(kept or f"{name} BROKEN" in report for name, kept in verdicts.items()), run.stdout + run.stderr
    broken = {name for name, kept in verdicts.items() if not kept}
    assert (run.returncode == 0) == (not broken)
    return broken


def append(file: Path, code: str) -> None:
    file.write_text(f"{file.read_text('utf-8')}\n\n{code}\n", "utf-8")


def test_every_import_points_in_the_direction_of_the_design(tree: Path) -> None:
    assert broken_contracts(tree) == set()


def test_a_late_import_of_a_lower_layer_is_allowed(tree: Path) -> None:
    append(tree / "runtime/npu_runtime/cli/inspect.py", "def late():\n    import npu_runtime.parity.metrics")
    append(tree / "exporter/npu_export/keymap.py", "def late():\n    import npu_runtime.encoder")
    assert broken_contracts(tree) == set()


@pytest.mark.parametrize("code", ["import npu_export.keymap", "def late():\n    from npu_export import keymap"])
def test_a_runtime_module_that_imports_the_exporter_is_refused(code: str, tree: Path) -> None:
    append(tree / "runtime/npu_runtime/parity/metrics.py", code)
    assert broken_contracts(tree) == {BETWEEN}


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("artifact/store", "npu_runtime.encoder"),
        ("errors", "npu_runtime.artifact.schema"),
        ("devices/probe", "npu_runtime.backends.table"),
        ("backends/base", "npu_runtime.encoder"),
        ("torch_interop", "npu_runtime.backends.base"),
        ("preprocess", "npu_runtime.encoder"),
        ("environment", "npu_runtime.bench.measure"),
        ("bench/measure", "npu_runtime.parity.metrics"),
        ("parity/verify", "npu_runtime.cli.console"),
        ("parity/records", "npu_runtime.report.document"),
        ("report/compose", "npu_runtime.cli.console"),
    ],
)
def test_a_late_import_of_a_higher_layer_is_refused(module: str, imported: str, tree: Path) -> None:
    append(tree / f"runtime/npu_runtime/{module}.py", f"def late():\n    import {imported}")
    assert broken_contracts(tree) == {INSIDE}


def test_a_module_without_a_layer_is_refused(tree: Path) -> None:
    (tree / "runtime/npu_runtime/stray.py").write_text("")
    assert broken_contracts(tree) == {INSIDE}
