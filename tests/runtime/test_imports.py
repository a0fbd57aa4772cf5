from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    *("torch", "onnxruntime", "onnx", "timm", "transformers", "PIL", "matplotlib", "jinja2", "safetensors"),
    "npu_export",
)


def run_blocked(code: str, blocked: tuple[str, ...], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own where some packages cannot be imported."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    command = [sys.executable, "-W", "error", "-c", block + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_importing_the_runtime_needs_none_of_the_heavy_packages() -> None:
    done = run_blocked("import npu_runtime, npu_runtime.cli", HEAVY)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("backend", "needed"), [("onnxruntime", ("onnxruntime",)), ("torchscript", ("torch",))], ids=["onnx", "torch"]
)
def test_a_backend_runs_with_its_own_package_alone(tiny_artifact: Path, backend: str, needed: tuple[str, ...]) -> None:
    code = """
import numpy as np
import npu_runtime
encoder = npu_runtime.load(sys.argv[1], backend=sys.argv[2])
print(encoder(np.ones((5, 3, 32, 32), np.float32)).shape)
"""
    blocked = tuple(name for name in HEAVY if name not in needed)
    done = run_blocked(code, blocked, tiny_artifact, backend)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(5, 64)\n", "")
    without = run_blocked(code, needed, tiny_artifact, backend)
    assert "UnavailableError" in without.stderr


@pytest.mark.parametrize(
    ("backend", "needed"), [("onnxruntime", "onnxruntime"), ("torchscript", "torch")], ids=["onnx", "torch"]
)
def test_a_fault_is_found_with_the_backends_own_package_alone(probed_vit: Path, backend: str, needed: str) -> None:
    code = """
from npu_runtime.artifact.store import open_artifact
from npu_runtime.parity.localise import localise
print(localise(open_artifact(sys.argv[1]), backend=sys.argv[2]).first)
"""
    blocked = tuple(name for name in HEAVY if name not in (needed, "safetensors"))
    done = run_blocked(code, blocked, probed_vit, backend)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
