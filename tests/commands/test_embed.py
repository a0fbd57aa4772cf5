"""npu-runtime embed."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import npu_runtime
from npu_runtime.artifact.store import open_artifact


@pytest.fixture
def images(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two image files in the working directory, which holds nothing else."""
    for name in ("chelsea.jpg", "coffee.jpg"):
        shutil.copy(photographs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return "chelsea.jpg", "coffee.jpg"


def others() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"chelsea.jpg", "coffee.jpg"}


def test_safetensors_hold_the_rows_of_embed_with_names_and_digest(
    call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    result = call("npu-runtime", "embed", tiny_artifact, *images)
    assert result.code == 0
    assert others() == {"features.safetensors"}
    with npu_runtime.load(tiny_artifact) as encoder:
        expected = encoder.embed(images)
    np.testing.assert_array_equal(load_file("features.safetensors")["embedding"], expected)
    with safe_open("features.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    opened = open_artifact(tiny_artifact)
    assert metadata == {
        "artifact_digest": opened.digest,
        "encoder": "tiny-vit",
        "weights": opened.manifest.weights_summary(),
        "images": json.dumps(images),
    }
    assert result.out.splitlines()[0] == f"weights   {opened.manifest.weights_summary()}"
    assert result.out.splitlines()[-1] == "embedding float32 [2, 64] in features.safetensors"


def test_the_rows_are_in_the_order_given(
    call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    for name, order in (("ab.npy", images), ("ba.npy", images[::-1])):
        assert call("npu-runtime", "embed", tiny_artifact, *order, "--output", name).code == 0
    ab, ba = np.load("ab.npy"), np.load("ba.npy")
    np.testing.assert_allclose(ab, ba[::-1], atol=1e-5)
    assert np.abs(ab - ba).max() > 0.1


@pytest.mark.parametrize("backend", ["onnx", "torchscript", "eager"])
def test_npy_holds_the_rows_of_embed_by_the_backend_named(
    backend: str, call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    record = call(
        "npu-runtime", "embed", tiny_artifact, *images, "--output", "f.npy", "--backend", backend, "--json"
    ).json
    features = np.load("f.npy")
    assert (features.dtype, features.shape) == (np.float32, (2, 64))
    with npu_runtime.load(tiny_artifact, backend=backend) as encoder:
        np.testing.assert_array_equal(features, encoder.embed(images))
        assert record["backend"] == encoder.backend
    assert record["shape"] == [2, 64]
    assert record["images"] == list(images)
    assert record["output"] == "f.npy"
    assert record["artifact_digest"] == open_artifact(tiny_artifact).digest
    assert others() == {"f.npy"}


def test_an_output_that_exists_is_kept_without_force(
    call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    Path("f.npy").write_text("mine")
    refused = call("npu-runtime", "embed", tiny_artifact, *images, "--output", "f.npy", "--json")
    assert (refused.code, refused.json["error"]["what"]) == (2, "the output exists")
    assert "--force" in refused.json["error"]["next"]
    assert Path("f.npy").read_text() == "mine"
    assert call("npu-runtime", "embed", tiny_artifact, *images, "--output", "f.npy", "--force").code == 0
    assert np.load("f.npy").shape == (2, 64)


def test_an_unknown_suffix_is_refused(call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]) -> None:
    result = call("npu-runtime", "embed", tiny_artifact, *images, "--output", "f.csv", "--json")
    assert result.code == 2
    assert result.json["error"] == {
        "what": "unknown kind of output",
        "where": "f.csv",
        "expected": ".safetensors or .npy",
        "got": ".csv",
    }
    assert others() == set()


def test_a_folder_that_does_not_exist_is_refused_before_the_artifact_is_opened(
    call: Callable[..., Any], images: tuple[str, str]
) -> None:
    result = call("npu-runtime", "embed", "no-artifact", *images, "--output", "no/f.npy", "--json")
    assert (result.code, result.json["error"]["where"]) == (2, "no")
    assert others() == set()


def test_missing_images_are_all_named_before_the_artifact_is_opened(
    call: Callable[..., Any], images: tuple[str, str]
) -> None:
    result = call("npu-runtime", "embed", "no-artifact", "x.jpg", *images, "y.jpg", "--json")
    assert (result.code, result.json["error"]["where"]) == (1, "x.jpg\ny.jpg")
    assert others() == set()


@pytest.mark.parametrize("damage", ["cut short", "no image"])
def test_an_image_that_cannot_be_read_is_named_and_leaves_no_output(
    damage: str, call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    data = Path(images[1]).read_bytes()
    Path(images[1]).write_bytes(data[: len(data) // 2] if damage == "cut short" else b"hello")
    result = call("npu-runtime", "embed", tiny_artifact, *images, "--json")
    assert (result.code, result.json["error"]["where"]) == (1, "coffee.jpg")
    assert others() == set()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_that_the_system_refuses_is_one_clear_error_and_leaves_the_old_one(
    suffix: str,
    run_command: Callable[..., subprocess.CompletedProcess[str]],
    tiny_artifact: Path,
    images: tuple[str, str],
) -> None:
    output = Path(f"f{suffix}")
    output.write_text("old")

    def at_most(nbytes: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    arguments = ("npu-runtime", "embed", tiny_artifact, *images, "--output", output, "--force", "--json")
    refused = run_command(*arguments, preexec_fn=at_most(400))
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    error = json.loads(refused.stdout)["error"]
    assert (error["what"], error["where"]) == ("the disk takes no more bytes", str(output))
    assert (output.read_text(), others()) == ("old", {output.name})
    assert run_command(*arguments, preexec_fn=at_most(4000)).returncode == 0
    assert output.read_bytes() != b"old"
    assert others() == {output.name}
