"""Fixtures that both trees share: a tiny encoder, its checkpoint and its artifact."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from simulated_npu.build import NoCompilerError, build_simulated_npu

from npu_export.pipeline import export
from npu_export.weights import find_weights

tiny.register()

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny ViT's seeded weights as Hugging Face's file names them. Not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    seeded = find_weights(tiny.TINY, "random:0")
    save_file({f"vit.{name}": seeded.read(name) for name in seeded.shapes}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder's artifact: both formats, batch 1 and 4. Not to be changed."""
    output = tmp_path_factory.mktemp("artifact") / "tiny-vit-fp32"
    return export("tiny-vit", weights=str(tiny_checkpoint), batch=(1, 4), output=output)


@pytest.fixture(scope="session", params=tiny.FAMILIES, ids=lambda encoder: encoder.name)
def probed_artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's tiny encoder with probes: both formats, batch 1. Not to be changed."""
    name = request.param.name
    return export(name, weights="random:3", probes=True, output=tmp_path_factory.mktemp("probed") / name)


@pytest.fixture
def probed_copy(probed_artifact: Path, tmp_path: Path) -> Path:
    """A copy of a family's artifact with probes that a test may damage."""
    return Path(shutil.copytree(probed_artifact, tmp_path / "probed"))


@pytest.fixture
def artifact_copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the tiny artifact that a test may damage."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def simulated_npu() -> Callable[..., dict[str, str]]:
    """The environment of a process that finds the simulated NPU, its switches set; built once and kept in build/."""

    own = f"{torch.__version__.partition('+')[0]}.post1"

    def environment(version: str = own, **switches: str) -> dict[str, str]:
        try:
            folder = build_simulated_npu(HERE.parent / "build" / "simulated-npu", version)
        except NoCompilerError as error:
            pytest.skip(str(error))
        paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": paths, **switches}

    return environment


@pytest.fixture
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `npu-export` or `npu-runtime`, with the tiny encoder known, in a process of its own."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(HERE / "tiny.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload, no-any-return]

    return run
