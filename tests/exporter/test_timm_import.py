"""Each case runs in a process of its own, with stand-ins for timm and torchvision first on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SYMPTOM = "operator torchvision::nms does not exist"
LIKE_TORCHVISION = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets.new_empty(0)
"""


def import_timm_beside(packages: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    for name, source in packages.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    program = (
        "from npu_export.timm_import import import_timm\n"
        "from npu_runtime.errors import UnavailableError\n"
        "import sys\n"
        "try:\n"
        "    print(import_timm().MARK)\n"
        "except UnavailableError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, env=environment
    )


def test_a_timm_that_imports_is_returned(tmp_path: Path) -> None:
    run = import_timm_beside({"timm": "MARK = 'stand-in'"}, tmp_path)
    assert (run.returncode, run.stdout) == (0, "stand-in\n"), run.stderr


def test_a_torchvision_without_its_operators_is_imported_all_the_same(tmp_path: Path) -> None:
    packages = {"timm": "import torchvision\nMARK = torchvision.__name__", "torchvision": LIKE_TORCHVISION}
    run = import_timm_beside(packages, tmp_path)
    assert (run.returncode, run.stdout) == (0, "torchvision\n"), run.stderr


def test_the_stand_in_for_torchvision_fails_without_the_declared_operators(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(LIKE_TORCHVISION)
    run = subprocess.run(
        [sys.executable, "-c", "import torchvision"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert run.returncode != 0
    assert SYMPTOM in run.stderr


def test_what_a_failed_import_left_is_forgotten_first(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "part.py").write_text("name = 'whole'")
    (tmp_path / "torchvision" / "__init__.py").write_text(
        f"import torchvision.part\n{LIKE_TORCHVISION}\nhalf = torchvision.part.name"
    )
    run = import_timm_beside({"timm": "import torchvision\nMARK = torchvision.half"}, tmp_path)
    assert (run.returncode, run.stdout) == (0, "whole\n"), run.stderr


def test_an_import_that_fails_for_another_reason_is_not_tried_again(tmp_path: Path) -> None:
    source = (
        "import sys\n"
        "sys.tries = getattr(sys, 'tries', 0) + 1\n"
        "if sys.tries == 1:\n"
        "    raise RuntimeError('out of luck')\n"
        "MARK = 'second try'"
    )
    run = import_timm_beside({"timm": source}, tmp_path)
    assert run.returncode == 4, run.stderr
    assert "out of luck" in run.stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('operator torchvision::roi_align does not exist')", "roi_align"),
        ("raise RuntimeError('out of luck')", "out of luck"),
        ("raise ImportError('no such package')", "no such package"),
        ("import a_package_that_is_not_here", "a_package_that_is_not_here"),
        (f"raise RuntimeError('{SYMPTOM}')", SYMPTOM),
    ],
)
def test_a_timm_that_does_not_import_is_reported_with_the_reason(source: str, reason: str, tmp_path: Path) -> None:
    run = import_timm_beside({"timm": source}, tmp_path)
    assert run.returncode == 4, run.stderr
    assert run.stdout.startswith("timm does not import here")
    assert reason in run.stdout
    assert "npu-export[export]" in run.stdout


def test_another_kind_of_error_is_not_hidden(tmp_path: Path) -> None:
    run = import_timm_beside({"timm": "raise ValueError('a fault of timm')"}, tmp_path)
    assert run.returncode == 1
    assert "ValueError: a fault of timm" in run.stderr
