from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from torch import nn

from npu_export.boundaries import boundary_names, is_block, record_boundaries
from npu_export.eager import run_eager
from npu_export.network import load_network, plan_weights
from npu_export.pipeline import export
from npu_export.plan import make_request, plan_export
from npu_export.precision import in_precision, torch_dtype
from npu_export.probes import Statistics, add_probes, collect_statistics
from npu_export.proof.arithmetic import SummedInFloat32, run_in
from npu_export.proof.limits import FLOAT64_IMAGES, UNIT_ROUNDOFF
from npu_export.proof.rounding import IN_FLOAT64
from npu_export.weights import find_weights
from npu_runtime.artifact.store import open_artifact
from npu_runtime.errors import Error
from npu_runtime.parity.sketch import WIDTH, relative_errors
from npu_runtime.steps import Silent


def statistics_of(name: str, weights: str, inputs: np.ndarray[Any, Any]) -> Statistics:
    """Of an encoder's own network with some weights."""
    encoder = next(encoder for encoder in tiny.FAMILIES if encoder.name == name)
    network = load_network(plan_weights(encoder, find_weights(encoder, weights)))
    with record_boundaries(network) as recorder:
        for image in inputs:
            run_eager(encoder.with_outputs(network), image[None])
    with record_boundaries(network, recorder.scales) as exact:
        run_in(encoder.with_outputs(network), inputs[:FLOAT64_IMAGES], IN_FLOAT64)
    return collect_statistics("fp32", recorder, exact, None, None)


def test_every_boundary_of_a_family_is_found_in_both_formats(probed_artifact: Path) -> None:
    artifact = open_artifact(probed_artifact)
    probes = artifact.manifest.probes
    assert probes is not None
    assert [boundary.module for boundary in probes.boundaries] == tiny.BOUNDARIES[artifact.manifest.encoder]
    assert (probes.batch, probes.accelerator_margin) == (1, 10)
    for boundary in probes.boundaries:
        assert set(boundary.places) == {"torchscript", "onnx"}
        assert 10 * UNIT_ROUNDOFF["fp32"] <= boundary.limit < 1.2e-5
        assert probes.limit_on(boundary, "npu") == 10 * probes.limit_on(boundary, "cpu") == 10 * boundary.limit
        assert boundary.fast_limit is not None
        assert 1e-3 < boundary.fast_limit < 1e-1
        assert probes.limit_on(boundary, "npu", "fast") == 10 * boundary.fast_limit
        assert probes.limit_on(boundary, "cpu", "fast") == boundary.limit
    assert probes.basis.startswith("10 times what rounding does there: the largest relative L2 error of an image")
    artifact.check_files()


def test_the_record_is_of_the_unmodified_network(probed_artifact: Path) -> None:
    artifact = open_artifact(probed_artifact)
    assert artifact.manifest.probes is not None
    records = artifact.read_probes(artifact.manifest.probes)
    expected = statistics_of(artifact.manifest.encoder, "random:3", artifact.read_reference()[0])
    assert set(load_file(probed_artifact / "probes.safetensors")) == {
        f"{module}.{kind}" for module in records for kind in ("sketch", "norm", "scale")
    }
    for module, record in records.items():
        assert (record.sketch.shape, record.norm.shape) == ((4, WIDTH), (4,))
        np.testing.assert_array_equal(record.sketch, expected.reference[module].sketch)
        np.testing.assert_array_equal(record.norm, expected.reference[module].norm)


def test_an_export_without_probes_has_none(tiny_artifact: Path) -> None:
    assert open_artifact(tiny_artifact).manifest.probes is None
    assert not (tiny_artifact / "probes.safetensors").exists()


def test_blocks_that_are_not_in_a_program_stop_the_export(probed_artifact: Path, tmp_path: Path) -> None:
    """The statistics of a network with other weights are looked for."""
    artifact = open_artifact(shutil.copytree(probed_artifact, tmp_path / "copy"))
    other = statistics_of(artifact.manifest.encoder, "random:4", artifact.read_reference()[0])
    with pytest.raises(Error, match="blocks of the network were not found in the torchscript program") as caught:
        add_probes(artifact, other, Silent())
    lost = [module for module in tiny.BOUNDARIES[artifact.manifest.encoder] if is_block(module)]
    named = [part.split()[0] for part in str(caught.value.got).removeprefix("none for ").split(", ")]
    assert named == lost


def test_a_failed_search_for_blocks_leaves_no_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_export.probes.NEAREST", -1.0)
    with pytest.raises(Error, match="blocks of the network were not found"):
        export("tiny-vit", weights="random:3", formats=("onnx",), probes=True, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_places_are_of_the_smallest_batch(tmp_path: Path) -> None:
    output = export("tiny-vit", weights="random:3", formats=("onnx",), batch=(5, 2), probes=True, output=tmp_path / "a")
    probes = open_artifact(output).manifest.probes
    assert probes is not None
    assert probes.batch == 2
    assert [boundary.module for boundary in probes.boundaries] == tiny.BOUNDARIES["tiny-vit"]


@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_a_plan_names_the_boundaries_and_their_size(encoder: Any, tmp_path: Path) -> None:
    plan = plan_export(make_request(encoder, probes=True, output=tmp_path / "a"), "random:3")
    assert set(plan.boundaries()) == set(tiny.BOUNDARIES[encoder.name])
    assert plan.sizes()["probes.safetensors"] == len(tiny.BOUNDARIES[encoder.name]) * 4 * 257 * 8


def test_a_plan_without_probes_has_no_size_for_them(tmp_path: Path) -> None:
    plan = plan_export(make_request("tiny-vit", output=tmp_path / "a"), "random:3")
    assert "probes.safetensors" not in plan.sizes()


def test_boundaries_are_blocks_and_what_stands_beside_their_containers() -> None:
    names = ["", "stem", "stem.0", "blocks", "blocks.0", "blocks.0.attn", "stages", "stages.0", "stages.0.blocks"]
    names += ["stages.0.blocks.11", "stages.0.blocks.11.mlp", "stages.0.downsample", "stages.0.downsample.1", "norm"]
    kept = ["stem", "blocks.0", "stages.0.blocks.11", "stages.0.downsample", "norm"]
    assert boundary_names(names) == kept
    assert [name for name in kept if is_block(name)] == ["blocks.0", "stages.0.blocks.11"]


class Stack(nn.Module):
    """Two blocks, the second of which runs as often as it is told to."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.drop = nn.Dropout()
        self.same = nn.Identity()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.times = times
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.same(self.drop(self.blocks[0](x)))
        for _ in range(self.times):
            x = self.blocks[1](x)
        return x


def test_what_does_nothing_is_no_boundary_and_hooks_are_taken_off() -> None:
    network = Stack(1)
    with record_boundaries(network) as recorder:
        network(torch.ones(3, 4))
    network(torch.ones(3, 4))
    assert list(recorder.records(3)) == ["blocks.0", "blocks.1"]
    assert recorder.sizes == {"blocks.0": 4, "blocks.1": 4}


@pytest.mark.parametrize("times", [0, 2])
def test_a_block_that_does_not_run_once_for_an_image_is_refused(times: int) -> None:
    network = Stack(times)
    with record_boundaries(network) as recorder:
        network(torch.ones(3, 4))
    with pytest.raises(Error, match="cannot be recorded") as caught:
        recorder.records(3)
    assert caught.value.got == "not blocks.1"


def test_a_network_without_blocks_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    with record_boundaries(network) as recorder:
        network(torch.ones(3, 4))
    with pytest.raises(Error, match="cannot be recorded"):
        recorder.records(3)


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 10), ("fp16", 3), ("bf16", 3)])
def test_the_limit_of_a_block_is_a_multiple_of_what_rounding_does_there(
    precision: Any, factor: float, tmp_path: Path
) -> None:
    formats = ("torchscript",)
    output = export(
        "tiny-vit", weights="random:3", formats=formats, precision=precision, probes=True, output=tmp_path / "a"
    )
    artifact = open_artifact(output)
    assert artifact.manifest.probes is not None
    module = tiny.TINY.with_outputs(load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:3"))))
    network: Any = module.network
    inputs, _ = artifact.read_reference()
    records = artifact.read_probes(artifact.manifest.probes)
    with record_boundaries(network, {name: record.scale for name, record in records.items()}) as rounded:
        if precision == "fp32":
            run_in(module, inputs[:FLOAT64_IMAGES], IN_FLOAT64)
        else:
            run_in(in_precision(module, precision), inputs, lambda: SummedInFloat32(torch_dtype(precision)))
    for boundary in artifact.manifest.probes.boundaries:
        record, other = (
            records[boundary.module],
            rounded.records(len(inputs[:FLOAT64_IMAGES] if precision == "fp32" else inputs)),
        )
        count = len(other[boundary.module].norm)
        errors = relative_errors(other[boundary.module].sketch, record.sketch[:count], record.norm[:count])
        assert boundary.limit == pytest.approx(factor * max(errors.max(), UNIT_ROUNDOFF[precision]), rel=0.1)
