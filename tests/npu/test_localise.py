"""Where in the network a program leaves the reference, on the emulated NPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import frozen_faults
import pytest

from npu_export.pipeline import export

LOCALISE = """
import sys
from npu_runtime.artifact.store import open_artifact
from npu_runtime.parity.localise import localise
for folder in sys.argv[2:]:
    found = localise(open_artifact(folder), backend="torchscript", device="npu:0", numerics=sys.argv[1])
    assert (found.device, found.format) == ("npu:0", "torchscript"), found
    print(found.first, ",".join(found.failed_plain), ",".join(found.failed_probed), sep=";")
"""


@pytest.fixture
def localise_on_npu(emulated_npu: Callable[..., dict[str, str]]) -> Callable[..., list[str]]:
    """`FIRST;OUTPUTS,BEYOND;BEYOND,PROBED` for each artifact."""

    def run(numerics: str, *folders: Path) -> list[str]:
        line = [sys.executable, "-c", LOCALISE, numerics, *map(str, folders)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=emulated_npu())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return run


def test_a_clean_program_passes_and_a_perturbed_block_is_found(
    probed_artifact: Path, probed_copy: Path, localise_on_npu: Callable[..., list[str]], rewrite: Callable[..., None]
) -> None:
    block = frozen_faults.blocks_of(probed_copy)[-1]
    frozen_faults.change_weight(probed_copy, "torchscript", block, frozen_faults.scale)
    rewrite(probed_copy)
    clean, perturbed = localise_on_npu("strict", probed_artifact, probed_copy)
    assert clean == "None;;"
    first, plain, probed = perturbed.split(";")
    assert (first, plain) == (block, probed)
    assert plain


def test_convolutions_in_hf32_are_within_the_limits_of_fast_numerics_in_every_block(
    tmp_path: Path, localise_on_npu: Callable[..., list[str]]
) -> None:
    folder = export("tiny-convnext", weights="random:3", formats=("torchscript",), probes=True, output=tmp_path / "a")
    assert localise_on_npu("fast", folder) == ["None;;"]
    document = json.loads((folder / "manifest.json").read_text("utf-8"))
    for boundary in document["probes"]["boundaries"]:
        boundary["fast_limit"] = None
    (folder / "manifest.json").write_text(json.dumps(document), "utf-8")
    assert localise_on_npu("fast", folder) == ["stem;;"]
