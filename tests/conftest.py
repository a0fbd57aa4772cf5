"""Fixtures that both trees share: a tiny encoder, its checkpoint and its artifact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from emulated_cann.build import NoCompilerError, build_emulated_cann, cann_environment
from safetensors.torch import save_file

from npu_export.pipeline import export
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.artifact.store import sha256_file

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
def emulated_npu() -> Callable[..., dict[str, str]]:
    """The environment of a process that finds the vendor's torch_npu on the emulated CANN, which is built once.

    What is given is set in it, such as EMULATED_CANN_FAULTS; emulated_cann/README.md lists what there is.
    """
    if find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed: scripts/test --stack npu has it")
    try:
        folder = build_emulated_cann(HERE.parent / "build" / "emulated-cann")
    except NoCompilerError as error:
        pytest.skip(str(error))

    def environment(**variables: object) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
        return {**inherited, **cann_environment(folder), **{name: str(value) for name, value in variables.items()}}

    return environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `npu` whatever runs on the emulated NPU."""
    for item in items:
        if "emulated_npu" in getattr(item, "fixturenames", ()):
            item.add_marker("npu")


@pytest.fixture
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `npu-export` or `npu-runtime`, with the tiny encoder known, in a process of its own."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(HERE / "tiny.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload, no-any-return]

    return run


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """Edit manifest.json of an artifact as JSON, hashes and sizes of all files brought up to date."""

    def edit(artifact: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
        file = artifact / MANIFEST_NAME
        manifest = json.loads(file.read_text("utf-8"))
        for record in manifest["files"]:
            path = artifact / record["file"]
            record.update(nbytes=path.stat().st_size, sha256=sha256_file(path))
        hashes = {record["file"]: record["sha256"] for record in manifest["files"]}
        for program in manifest["programs"]:
            program["sha256"] = hashes[program["file"]]
        change(manifest)
        file.write_text(json.dumps(manifest), "utf-8")

    return edit


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder with two photographs, chelsea.jpg and coffee.jpg."""
    return HERE / "data" / "photographs"
