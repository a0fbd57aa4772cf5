"""What an artifact says of its making: weights, versions, revision."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from npu_export.network import WeightsPlan
from npu_export.weights import is_remote
from npu_runtime import __version__
from npu_runtime.artifact.schema import Provenance, SourceFile, Weights
from npu_runtime.artifact.store import sha256_file
from npu_runtime.environment import package_versions

PACKAGES = ("torch", "timm", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "safetensors")


def describe_provenance(plan: WeightsPlan, state_sha256: str) -> Provenance:
    """Provenance of an export; hashes the checkpoint's files."""
    checkpoint = plan.checkpoint
    files = tuple(
        SourceFile(str(file), file.stat().st_size, sha256_file(file))
        for file in (path.resolve() for path in checkpoint.files)
    )
    by_path = checkpoint.files and not is_remote(checkpoint.source)
    source = str(Path(checkpoint.source).resolve()) if by_path else checkpoint.source
    versions = {"npu-export": __version__, "python": platform.python_version(), **package_versions(PACKAGES)}
    weights = Weights(
        source, plan.layout.name, plan.prefix, files, checkpoint.random_seed, state_sha256, plan.coverage()
    )
    return Provenance(weights, versions, project_revision())


def project_revision() -> str | None:
    """Git revision of the checkout that this module was imported from, None where it is in no checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None  # an installed copy, perhaps inside somebody else's checkout
    revision = git("rev-parse", "HEAD")
    return f"{revision}-dirty" if revision and git("status", "--porcelain") else revision
