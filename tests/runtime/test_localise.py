from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frozen_faults
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from watching import Watching

from npu_export.pipeline import export
from npu_runtime import ArtifactError, UnavailableError, UsageError
from npu_runtime.artifact.store import Artifact, open_artifact
from npu_runtime.backends.onnx_bytes import read_nodes, with_outputs
from npu_runtime.parity.localise import BoundaryError, Localisation, localise
from npu_runtime.structured import Reader, to_json
from npu_runtime.torch_interop import without_jit_deprecation

FORMATS = {"onnx": "onnxruntime", "torchscript": "torchscript"}
Record = Callable[[Path], Artifact]
Edit = Callable[..., None]

formats = pytest.mark.parametrize("format", FORMATS)


class Unfrozen(nn.Module):
    """A program with a weight of its own, beside the one that it calls."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("zero", torch.zeros(1))

    @torch.jit.export
    def b3(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.program.b3(x + self.zero)  # type: ignore[no-any-return]


@pytest.fixture
def vit_copy(probed_vit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(probed_vit, tmp_path / "vit"))


@formats
def test_nothing_is_found_in_a_clean_program(probed_artifact: Path, format: str) -> None:
    found = localise(open_artifact(probed_artifact), backend=format)
    assert (found.backend, found.device, found.format, found.batch) == (FORMATS[format], "cpu", format, 1)
    assert (found.first, found.failed_plain, found.failed_probed) == (None, (), ())
    assert set(frozen_faults.blocks_of(probed_artifact)) < {boundary.module for boundary in found.boundaries}
    assert all(b.passed and b.nonfinite == 0 and b.relative_l2_error < b.limit / 5 for b in found.boundaries)
    assert found.describe().endswith("within their limits; the outputs are within their tolerances")


@formats
def test_the_block_with_a_perturbed_weight_is_found(
    probed_artifact: Path, tmp_path: Path, record_again: Record, format: str
) -> None:
    for block in frozen_faults.blocks_of(probed_artifact):
        copy = Path(shutil.copytree(probed_artifact, tmp_path / block))
        frozen_faults.change_weight(copy, format, block, frozen_faults.scale)
        found = localise(record_again(copy), backend=format)
        assert found.first == block
        assert found.failed_plain == found.failed_probed != ()
        assert f"the first boundary beyond its limit is {block}: " in found.describe()
        assert "the error persists" in found.describe()
        (other,) = set(FORMATS) - {format}
        assert localise(open_artifact(copy), backend=other).first is None


@formats
def test_the_block_whose_gelu_is_a_tanh_is_found(probed_copy: Path, record_again: Record, format: str) -> None:
    if "aimv2" in open_artifact(probed_copy).manifest.encoder:
        pytest.skip("AIMv2 has no GELU")
    block = frozen_faults.blocks_of(probed_copy)[-2]
    frozen_faults.tanh_gelu(probed_copy, format, block)
    assert localise(record_again(probed_copy), backend=format).first == block


@formats
def test_nan_is_found_where_it_begins(probed_copy: Path, record_again: Record, format: str) -> None:
    before, block = frozen_faults.blocks_of(probed_copy)[-2:]
    frozen_faults.change_weight(probed_copy, format, block, frozen_faults.nan)
    found = localise(record_again(probed_copy), backend=format)
    assert found.first == block
    errors = {boundary.module: boundary for boundary in found.boundaries}
    assert errors[before].passed
    assert errors[block].nonfinite > 0
    assert "values are NaN or infinite" in found.describe()
    reader = Reader("the record", "here", "", ArtifactError, allow_not_finite=True)
    read = reader.decode(Localisation, json.loads(json.dumps(to_json(found), allow_nan=False)), lenient=False)
    assert str(read) == str(found)


@formats
def test_batches_that_the_images_do_not_fill_are_run_whole(
    probed_vit: Path, vit_copy: Path, record_again: Record, format: str
) -> None:
    clean = localise(open_artifact(probed_vit), backend=format)
    assert (clean.first, clean.batch, clean.failed_plain, clean.failed_probed) == (None, 3, (), ())
    frozen_faults.change_weight(vit_copy, format, "blocks.1", frozen_faults.scale)
    assert localise(record_again(vit_copy), backend=format).first == "blocks.1"


@pytest.mark.parametrize(("name", "precision"), [("tiny-vit", "fp16"), ("tiny-aimv2", "fp16"), ("tiny-dinov2", "bf16")])
def test_faults_are_found_in_half_precision(name: str, precision: str, tmp_path: Path, record_again: Record) -> None:
    chosen = ("torchscript",) if precision == "bf16" else tuple(FORMATS)
    folder = tmp_path / name
    export(name, weights="random:3", formats=chosen, precision=precision, probes=True, output=folder)

    def double(weight: np.ndarray) -> None:
        weight *= 2

    for format in chosen:
        copy = Path(shutil.copytree(folder, tmp_path / format))
        assert localise(open_artifact(copy), backend=format).first is None
        frozen_faults.change_weight(copy, format, "blocks.1", double)
        assert localise(record_again(copy), backend=format).first == "blocks.1"


def test_a_fault_behind_the_last_boundary_is_told_as_such(vit_copy: Path, record_again: Record) -> None:
    def take_another_token(graph: Any) -> None:
        (select,) = (node for node in graph.nodes() if node.kind() == "aten::select")
        one = graph.insertConstant(1)
        one.node().moveBefore(select)
        select.replaceInput(2, one)

    frozen_faults.edit_torchscript(vit_copy, take_another_token)
    found = localise(record_again(vit_copy), backend="torchscript")
    assert (found.first, found.failed_plain, found.failed_probed) == (None, ("embedding",), ("embedding",))
    assert "all 4 boundaries are within their limits: the fault lies behind the last, norm" in found.describe()


def test_an_error_that_vanishes_or_appears_under_instrumentation_is_told() -> None:
    within = BoundaryError("blocks.0", 1e-7, 1e-6, 0, True)

    def told(plain: tuple[str, ...], probed: tuple[str, ...]) -> str:
        return Localisation("onnxruntime", "cpu", "onnx", 1, (within,), None, plain, probed).describe()

    assert "the error vanishes under instrumentation: suspect what is fused" in told(("tokens",), ())
    assert "the fault lies behind" not in told(("tokens",), ())
    assert "tokens beyond tolerance under instrumentation alone" in told((), ("tokens",))


@formats
def test_a_bounded_number_of_boundaries_is_held_at_a_time(
    probed_artifact: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr("npu_runtime.parity.localise.AT_ONCE", 3)
    watch = Watching()
    found = localise(open_artifact(probed_artifact), backend=format, watch=watch)
    (passes,) = watch.counts
    assert (passes.total, passes.unit) == (-(-len(found.boundaries) // 3), "passes")
    watch.assert_all_done()
    assert found.first is None


def test_an_artifact_without_probes_is_refused(tiny_artifact: Path) -> None:
    with pytest.raises(UsageError, match="exported without probes") as caught:
        localise(open_artifact(tiny_artifact), backend="onnxruntime")
    assert caught.value.hint == "export again with --probes"


def test_a_backend_without_a_program_is_refused(probed_vit: Path) -> None:
    with pytest.raises(UsageError, match="eager has no program to look into"):
        localise(open_artifact(probed_vit), backend="eager")


@formats
def test_a_place_that_the_program_lacks_is_refused(vit_copy: Path, edit_manifest: Edit, format: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["probes"]["boundaries"][1]["places"][format] = "aten::nothing:7"

    edit_manifest(vit_copy, change)
    with pytest.raises(ArtifactError, match="lacks values that the manifest's probes name") as caught:
        localise(open_artifact(vit_copy), backend=format)
    assert caught.value.got == "no aten::nothing:7"


@formats
def test_a_value_of_another_shape_is_beyond_its_limit(vit_copy: Path, edit_manifest: Edit, format: str) -> None:
    def change(document: dict[str, Any]) -> None:
        patches, block, *_ = document["probes"]["boundaries"]
        block["places"][format] = patches["places"][format]

    edit_manifest(vit_copy, change)
    assert localise(open_artifact(vit_copy), backend=format).first == "blocks.0"


def test_a_torchscript_program_that_is_not_frozen_is_refused(
    vit_copy: Path, edit_manifest: Edit, record_again: Record
) -> None:
    with without_jit_deprecation():
        program = torch.jit.load(str(vit_copy / "model.ts"))
        torch.jit.script(Unfrozen(program)).save(str(vit_copy / "model.ts"))

    def change(document: dict[str, Any]) -> None:
        for boundary in document["probes"]["boundaries"]:
            boundary["places"]["torchscript"] = "aten::add:0"

    edit_manifest(vit_copy, change)
    with pytest.raises(ArtifactError, match="is not frozen"):
        localise(record_again(vit_copy), backend="torchscript")


@pytest.mark.parametrize("lost", ["blocks.1.sketch", "norm.norm"])
def test_a_record_that_lacks_a_boundary_is_refused(vit_copy: Path, record_again: Record, lost: str) -> None:
    file = vit_copy / "probes.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file)
    with pytest.raises(ArtifactError, match=f"does not hold {lost.rpartition('.')[0]} as the manifest says"):
        localise(record_again(vit_copy), backend="onnxruntime")


def test_a_changed_record_is_refused(vit_copy: Path) -> None:
    with (vit_copy / "probes.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(ArtifactError, match="has changed"):
        localise(open_artifact(vit_copy), backend="onnxruntime")


def test_a_torch_without_functions_from_graphs_is_refused(probed_vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_create_function_from_graph")
    with pytest.raises(UnavailableError, match="values from inside"):
        localise(open_artifact(probed_vit), backend="torchscript")


def test_an_onnxruntime_that_reads_no_weights_for_graphs_in_memory_is_given_files(
    probed_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnxruntime before 1.20 is."""
    real = onnxruntime.InferenceSession
    opened: list[str] = []

    def session(model: str | bytes, *arguments: Any, **options: Any) -> Any:
        if isinstance(model, bytes):
            raise RuntimeError("model_path must not be empty")
        opened.append(Path(model).name)
        return real(model, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    assert localise(open_artifact(probed_vit), backend="onnxruntime").first is None
    assert opened == ["model.b3.onnx", "with-outputs.onnx"]


def test_added_outputs_are_what_onnx_reads(probed_vit: Path) -> None:
    data = (probed_vit / "model.b3.onnx").read_bytes()
    nodes, outputs = read_nodes(data)
    whole = onnx.load_model_from_string(data).graph
    assert outputs == [output.name for output in whole.output]
    assert [(n.operator, list(n.inputs), list(n.outputs)) for n in nodes] == [
        (n.op_type, list(n.input), list(n.output)) for n in whole.node
    ]
    names = ["add_2", "ä" * 200]
    more = onnx.load_model_from_string(with_outputs(data, names)).graph
    assert [output.name for output in more.output] == [*outputs, *names]
    assert more.node == whole.node
    assert more.initializer == whole.initializer


@pytest.mark.parametrize("data", [b"\x3a\xff", b"\x3a\x05abc", b"\x3f", b"\xff" * 20, b"\x3a\x04\x0a\x02\x0a\x09"])
def test_bytes_that_are_no_graph_raise_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"field|number"):
        read_nodes(data)
