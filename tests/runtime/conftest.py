"""What tests of the runtime do to an artifact's copy, and programs that are wrong on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper

from npu_export.pipeline import export
from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.artifact.store import Artifact, open_artifact, record_file
from npu_runtime.torch_interop import without_jit_deprecation

settings.register_profile(
    "same-everywhere", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same-everywhere")

Array = npt.NDArray[np.float32]
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def images() -> Array:
    """Nine images of the tiny encoder's size."""
    return np.random.default_rng(7).standard_normal((9, 3, 32, 32), np.float32)


@pytest.fixture
def edit_manifest() -> Callable[[Path, Edit], None]:
    """Change an artifact's manifest as JSON."""

    def edit(folder: Path, change: Edit) -> None:
        document = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))
        change(document)
        (folder / MANIFEST_NAME).write_text(json.dumps(document), "utf-8")

    return edit


@pytest.fixture
def record_again(edit_manifest: Callable[[Path, Edit], None]) -> Callable[[Path], Artifact]:
    """Put the sizes and hashes of the files as they are now into the manifest, and open the artifact."""

    def record(folder: Path) -> Artifact:
        def change(document: dict[str, Any]) -> None:
            now = {record["file"]: record_file(folder, record["file"]).record for record in document["files"]}
            for record in document["files"]:
                record.update(nbytes=now[record["file"]].nbytes, sha256=now[record["file"]].sha256)
            for program in document["programs"]:
                program["sha256"] = now[program["file"]].sha256

        edit_manifest(folder, change)
        return open_artifact(folder)

    return record


@pytest.fixture(scope="session")
def probed_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ViT with probes, batch 3 and 4, so that reference images do not fill batches. Not to be changed."""
    output = tmp_path_factory.mktemp("probed-vit") / "tiny-vit"
    return export("tiny-vit", weights="random:3", batch=(4, 3), probes=True, output=output)


@pytest.fixture
def write_root_graph() -> Callable[..., None]:
    """Write an ONNX graph whose outputs are all the root of the image's sum: NaN where the sum is negative."""

    def write(path: Path, batch: int, *, input_name: str = "pixel_values", width: int = 64) -> None:
        float32 = TensorProto.FLOAT
        outputs = {"embedding": [batch, width], "tokens": [batch, 17, width]}
        nodes = [
            helper.make_node("ReduceSum", [input_name, "axes"], ["sum"], keepdims=0),
            helper.make_node("Sqrt", ["sum"], ["root"]),
        ]
        constants = [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])]
        for name, shape in outputs.items():
            column = [batch] + [1] * (len(shape) - 1)
            constants.append(helper.make_tensor(f"{name}.column", TensorProto.INT64, [len(shape)], column))
            constants.append(helper.make_tensor(f"{name}.shape", TensorProto.INT64, [len(shape)], shape))
            nodes.append(helper.make_node("Reshape", ["root", f"{name}.column"], [f"{name}.root"]))
            nodes.append(helper.make_node("Expand", [f"{name}.root", f"{name}.shape"], [name]))
        graph = helper.make_graph(
            nodes,
            "root",
            [helper.make_tensor_value_info(input_name, float32, [batch, 3, 32, 32])],
            [helper.make_tensor_value_info(name, float32, shape) for name, shape in outputs.items()],
            constants,
        )
        opsets = [helper.make_opsetid("", 18)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)

    return write


@pytest.fixture
def wrap_torchscript() -> Callable[[Path, type[torch.nn.Module]], None]:
    """Replace a TorchScript file by a module around it, whose class gives `b1` and `b4`."""

    def wrap(path: Path, kind: type[torch.nn.Module]) -> None:
        with without_jit_deprecation():
            torch.jit.script(kind(torch.jit.load(str(path)))).save(str(path))

    return wrap
