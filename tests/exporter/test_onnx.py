from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from torch import nn

import npu_export
from npu_export.network import load_network, plan_weights
from npu_export.onnx import (
    ALIGNMENT,
    INLINE_NBYTES,
    WEIGHTS_FILE,
    WeightsFile,
    check_graph,
    export_graph,
    graph_file,
    write_graph,
)
from npu_export.precision import in_precision
from npu_export.weights import find_weights
from npu_runtime.errors import Error

BATCHES = (1, 2, 4, 8)
INPUT, OUTPUTS = tiny.TINY.inputs[0], tiny.TINY.outputs


@pytest.fixture(scope="module")
def module() -> nn.Module:
    network = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:0")))
    return tiny.TINY.with_outputs(network)


def freeze(module: nn.Module, batches: tuple[int, ...], folder: Path) -> Path:
    with (folder / WEIGHTS_FILE).open("wb") as file:
        weights = WeightsFile(file)
        for batch in batches:
            model, _ = export_graph(module, INPUT, OUTPUTS, batch, 18)
            write_graph(model, weights, folder / graph_file(batch))
    return folder


@pytest.fixture(scope="module")
def frozen(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze(module, BATCHES, tmp_path_factory.mktemp("onnx"))


def external(graph: onnx.ModelProto) -> Mapping[str, tuple[int, int]]:
    """Offset and length of each tensor that lies in the weights file."""
    places = {}
    for tensor in graph.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == WEIGHTS_FILE
            places[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return places


def read(folder: Path, batch: int) -> onnx.ModelProto:
    return onnx.load(folder / graph_file(batch), load_external_data=False)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_graph_has_one_opset_fixed_shapes_and_the_names_of_its_outputs(frozen: Path, batch: int) -> None:
    model = read(frozen, batch)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    signature = {
        value.name: (value.type.tensor_type.elem_type, [d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    }
    assert signature == {spec.name: (onnx.TensorProto.FLOAT, list(spec.of_batch(batch))) for spec in (INPUT, *OUTPUTS)}
    assert len(model.functions) == 0


def test_a_graph_of_half_precision_has_float32_inputs_and_outputs_and_half_the_weights(
    frozen: Path, tmp_path: Path
) -> None:
    network = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:0")))
    half = in_precision(tiny.TINY.with_outputs(network), "fp16")
    graph = read(freeze(half, (1,), tmp_path), 1).graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    weights = {tensor.data_type for tensor in graph.initializer if tensor.external_data}
    assert weights == {onnx.TensorProto.FLOAT16}
    full = sum(nbytes for _, nbytes in external(read(frozen, 1)).values())
    assert 0.45 * full < sum(nbytes for _, nbytes in external(read(tmp_path, 1)).values()) < 0.51 * full


@pytest.mark.parametrize("batch", BATCHES)
def test_a_graph_passes_the_checker_and_runs_in_plain_onnxruntime(frozen: Path, module: nn.Module, batch: int) -> None:
    check_graph(frozen / graph_file(batch))
    session = onnxruntime.InferenceSession(str(frozen / graph_file(batch)), providers=["CPUExecutionProvider"])
    pixel_values = torch.randn(INPUT.of_batch(batch), generator=torch.Generator().manual_seed(0))
    got = session.run([spec.name for spec in OUTPUTS], {INPUT.name: pixel_values.numpy()})
    with torch.inference_mode():
        expected = module(pixel_values)
    for a, b in zip(got, expected):
        assert a.dtype == np.float32
        assert np.abs(a - b.numpy()).max() <= 5e-5


def test_the_weights_are_shared_by_every_batch_size(frozen: Path, module: nn.Module, tmp_path: Path) -> None:
    alone = freeze(module, (1,), tmp_path)
    assert (frozen / graph_file(1)).read_bytes() == (alone / graph_file(1)).read_bytes()
    first = (alone / WEIGHTS_FILE).read_bytes()
    shared = (frozen / WEIGHTS_FILE).read_bytes()
    assert shared.startswith(first)
    # torch folds the CLS token, repeated for each image, into a constant of the graph.
    repeated = sum(ALIGNMENT + 4 * 64 * batch for batch in BATCHES if 4 * 64 * batch > INLINE_NBYTES)
    assert len(shared) <= len(first) + repeated
    own = set(external(read(alone, 1)).values())
    for batch in BATCHES:
        others = set(external(read(frozen, batch)).values()) - own
        assert all(nbytes == 4 * 64 * batch for _, nbytes in others)


@pytest.mark.parametrize("batch", BATCHES)
def test_external_tensors_are_aligned_apart_and_inside_the_file(frozen: Path, batch: int) -> None:
    places = sorted(set(external(read(frozen, batch)).values()))
    assert places
    assert all(offset % ALIGNMENT == 0 for offset, _ in places)
    assert all(end <= start for end, start in zip([o + n for o, n in places], [o for o, _ in places[1:]]))
    assert max(offset + nbytes for offset, nbytes in places) <= (frozen / WEIGHTS_FILE).stat().st_size


def test_large_tensors_lie_outside_the_graph_and_small_ones_inside(frozen: Path) -> None:
    for tensor in read(frozen, 1).graph.initializer:
        nbytes = int(np.prod(tensor.dims)) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        assert bool(tensor.external_data) == (nbytes > INLINE_NBYTES), tensor.name


def test_equal_bytes_are_written_once_and_others_apart(tmp_path: Path) -> None:
    with (tmp_path / "weights").open("wb") as file:
        weights = WeightsFile(file)
        first, second = weights.add(b"a" * 5), weights.add(b"b" * 5000)
        assert weights.add(bytes(b"a" * 5)) == first
        third = weights.add(b"c")
    assert (first, second, third) == (0, ALIGNMENT, 3 * ALIGNMENT)
    data = (tmp_path / "weights").read_bytes()
    assert data[first : first + 5] == b"a" * 5
    assert data[second : second + 5000] == b"b" * 5000
    assert data[third:] == b"c"


def test_no_graph_names_a_place_on_this_machine_or_holds_a_stack_trace(frozen: Path) -> None:
    assert npu_export.__file__ is not None
    places = [sys.prefix, str(Path(npu_export.__file__).parents[2]), str(frozen), os.getcwd()]
    marks = [b"site-packages", b"Traceback", b'File "', b".py", *(place.encode() for place in places)]
    for batch in BATCHES:
        content = (frozen / graph_file(batch)).read_bytes()
        assert not [mark for mark in marks if mark in content]


def test_an_opset_that_torch_does_not_honour_is_refused(module: nn.Module) -> None:
    with pytest.raises(Error, match="another opset") as raised:
        export_graph(module, INPUT, OUTPUTS, 1, 16)
    assert raised.value.expected == "ai.onnx 16"
    assert raised.value.got == "ai.onnx 18"


def test_a_newer_opset_that_torch_honours_is_written(module: nn.Module) -> None:
    model, _ = export_graph(module, INPUT, OUTPUTS, 1, 20)
    assert dict(model.opset_imports) == {"": 20}


def test_a_graph_that_the_checker_refuses_is_an_error_of_ours(frozen: Path, tmp_path: Path) -> None:
    model = read(frozen, 1)
    (tmp_path / WEIGHTS_FILE).write_bytes((frozen / WEIGHTS_FILE).read_bytes())
    onnx.save(model, tmp_path / "model.onnx")
    check_graph(tmp_path / "model.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(Error, match=r"onnx\.checker refuses"):
        check_graph(tmp_path / "model.onnx")


def test_a_graph_without_its_weights_is_refused(frozen: Path, tmp_path: Path) -> None:
    onnx.save(read(frozen, 1), tmp_path / graph_file(1))
    with pytest.raises(Error, match=r"onnx\.checker refuses"):
        check_graph(tmp_path / graph_file(1))
