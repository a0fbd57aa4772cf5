"""Commands and scripts on the emulated NPU, in processes of their own, and artifacts for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from npu_export.pipeline import export

TESTS = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(emulated_npu: Callable[..., dict[str, str]]) -> Run:
    """Run npu-runtime, which knows the tiny encoders, with further variables of the environment."""

    def run(*arguments: str | Path, **variables: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(TESTS / "tiny.py"), "npu-runtime", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=300, env=emulated_npu(**variables))

    return run


@pytest.fixture
def script(emulated_npu: Callable[..., dict[str, str]]) -> Run:
    """Run Python, which knows the tiny encoders and finds its arguments in sys.argv; it must end well."""

    def run(code: str, *arguments: str | Path, **variables: object) -> subprocess.CompletedProcess[str]:
        prologue = f"import sys; sys.path.insert(0, {str(TESTS)!r})\nimport tiny; tiny.register()\n"
        line = [sys.executable, "-c", prologue + code, *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=emulated_npu(**variables))
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session", params=tiny.FAMILIES, ids=lambda encoder: encoder.name)
def family_artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's tiny encoder as TorchScript, batch 1 and 2. Not to be changed."""
    name = request.param.name
    output = tmp_path_factory.mktemp(name) / name
    return export(name, weights="random:3", formats=("torchscript",), batch=(1, 2), output=output)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ViT as TorchScript, batch 1, 2 and 4. Not to be changed."""
    output = tmp_path_factory.mktemp("npu") / "tiny-vit"
    return export("tiny-vit", weights="random:3", formats=("torchscript",), batch=(1, 2, 4), output=output)
