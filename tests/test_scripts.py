"""The scripts that the README names, as far as they run without a full-size network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from npu_export.checkpoint import open_checkpoint

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_a_seeded_checkpoint_has_the_keys_of_its_layout_and_says_its_seed(tmp_path: Path) -> None:
    (tmp_path / "keys.tsv").write_text("norm.weight\t8\nlogit_scale\t\nfc.weight\t4,8\n", "utf-8")
    command = [sys.executable, SCRIPTS / "make_checkpoint.py", tmp_path / "keys.tsv", tmp_path / "made", "--seed", "7"]
    subprocess.run(command, check=True, capture_output=True)
    checkpoint = open_checkpoint(tmp_path / "made")
    assert checkpoint.shapes == {"norm.weight": (8,), "logit_scale": (), "fc.weight": (4, 8)}
    assert checkpoint.random_seed == 7
    assert float(checkpoint.read("logit_scale")) != 0


@pytest.mark.parametrize(
    "name", ["bench_peers.py", "benchmark.py", "benchmark_embed.py", "export_table.py", "make_checkpoint.py"]
)
def test_a_script_says_what_it_does(name: str) -> None:
    run = subprocess.run([sys.executable, SCRIPTS / name, "--help"], check=True, capture_output=True, text=True)
    assert "--output" in run.stdout or "--seed" in run.stdout


def test_a_stack_that_is_unknown_is_refused_with_the_choices() -> None:
    run = subprocess.run([SCRIPTS / "test", "--stack", "newest"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "choose current, old, ascend, npu or npu-ascend" in run.stderr
