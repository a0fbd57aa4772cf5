"""Faults put into the files of a frozen artifact, in one block of the network, by the places that its probes name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from npu_runtime.artifact.schema import Program
from npu_runtime.artifact.store import open_artifact
from npu_runtime.torch_interop import without_jit_deprecation

Change = Callable[[np.ndarray], None]


def scale(weight: np.ndarray) -> None:
    weight *= weight.dtype.type(1.01)


def nan(weight: np.ndarray) -> None:
    weight.reshape(-1)[0] = np.nan


def perturb_torchscript(folder: Path) -> None:
    """One weight of a matrix half-way through model.ts, in every batch size; no probes are needed."""
    with without_jit_deprecation():
        program = torch.jit.load(str(folder / "model.ts"))
        constants = [
            n for n in program.forward.graph.nodes() if n.kind() == "prim::Constant" and "value" in n.attributeNames()
        ]
        tensors = [node.t("value") for node in constants if node.kindOf("value") == "t"]
        matrices = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() == 2]
        matrices[len(matrices) // 2].view(-1)[7] += 0.05  # the methods share it
        torch.jit.save(program, str(folder / "model.ts"))


def blocks_of(folder: Path) -> list[str]:
    """The names of the blocks in an artifact's probes."""
    probes = open_artifact(folder).manifest.probes
    assert probes is not None
    return [b.module for b in probes.boundaries if b.module.split(".")[-2:-1] == ["blocks"]]


def change_weight(folder: Path, format: str, module: str, change: Change) -> None:
    """Change the matrix that is multiplied last on the way to a module's output, in the program's own file."""
    {"onnx": _change_onnx_weight, "torchscript": _change_torchscript_weight}[format](folder, module, change)


def tanh_gelu(folder: Path, format: str, module: str) -> None:
    """Have the GELU of a block approximated by a tanh."""
    {"onnx": _tanh_in_onnx, "torchscript": _tanh_in_torchscript}[format](folder, module)


def edit_torchscript(folder: Path, edit: Callable[[Any], None]) -> None:
    """Edit the graph of model.ts that the probes are of."""
    with without_jit_deprecation():
        program = torch.jit.load(str(folder / "model.ts"))
        edit(getattr(program, str(_program(folder, "torchscript").entry_point)).graph)
        torch.jit.save(program, str(folder / "model.ts"))


def _program(folder: Path, format: str) -> Program:
    """The program that the probes are of."""
    manifest = open_artifact(folder).manifest
    assert manifest.probes is not None
    batch = manifest.probes.batch
    return next(program for program in manifest.programs_for(format) if program.batch == batch)


def _places(folder: Path, format: str, module: str) -> tuple[str | None, str]:
    """Where the output of the module is, and of the boundary before it; None for the first."""
    probes = open_artifact(folder).manifest.probes
    assert probes is not None
    places = {boundary.module: boundary.places[format] for boundary in probes.boundaries}
    names = list(places)
    index = names.index(module)
    return (places[names[index - 1]] if index else None), places[module]


def _torchscript_nodes(graph: Any, start: str | None, stop: str) -> list[Any]:
    """The nodes behind one place, up to another."""
    nodes, counts, positions = list(graph.nodes()), dict[str, int](), dict[str, int]()
    for position, node in enumerate(nodes):
        index = counts[node.kind()] = counts.get(node.kind(), -1) + 1
        positions[f"{node.kind()}:{index}"] = position
    return nodes[0 if start is None else positions[start] + 1 : positions[stop] + 1]


def _change_torchscript_weight(folder: Path, module: str, change: Change) -> None:
    def edit(graph: Any) -> None:
        nodes = _torchscript_nodes(graph, *_places(folder, "torchscript", module))
        node = next(node for node in reversed(nodes) if node.kind() == "aten::linear")
        weight = list(node.inputs())[1].node().t("value")
        values = weight.float().numpy()
        change(values)
        weight.copy_(torch.from_numpy(values))

    edit_torchscript(folder, edit)


def _tanh_in_torchscript(folder: Path, module: str) -> None:
    def edit(graph: Any) -> None:
        nodes = _torchscript_nodes(graph, *_places(folder, "torchscript", module))
        (gelu,) = (node for node in nodes if node.kind() == "aten::gelu")
        tanh = graph.insertConstant("tanh")
        tanh.node().moveBefore(gelu)
        gelu.replaceInput(1, tanh)

    edit_torchscript(folder, edit)


def _onnx_nodes(graph: Any, start: str | None, stop: str) -> list[Any]:
    made = {output: position for position, node in enumerate(graph.node) for output in node.output}
    return list(graph.node)[0 if start is None else made[start] + 1 : made[stop] + 1]


def _change_onnx_weight(folder: Path, module: str, change: Change) -> None:
    """In weights.onnx.data, or in the graph where the matrix is small enough to lie there."""
    path = folder / _program(folder, "onnx").file
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = _onnx_nodes(model.graph, *_places(folder, "onnx", module))
    product = next(node for node in reversed(nodes) if node.op_type == "MatMul" and node.input[1] in tensors)
    tensor = tensors[product.input[1]]
    if not tensor.external_data:
        values = numpy_helper.to_array(tensor).copy()
        change(values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return onnx.save(model, path)
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        values = np.frombuffer(file.read(int(place["length"])), dtype).copy()
        change(values)
        file.seek(int(place["offset"]))
        file.write(values.tobytes())


def _tanh_in_onnx(folder: Path, module: str) -> None:
    """erf(u) -> tanh(2 / sqrt(pi) (u + 2 * 0.044715 u^3)), which is GELU's tanh for u = x / sqrt(2)."""
    path = folder / _program(folder, "onnx").file
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    (erf,) = (node for node in _onnx_nodes(graph, *_places(folder, "onnx", module)) if node.op_type == "Erf")
    factors = {"tanh.linear": 2 / math.sqrt(math.pi), "tanh.cubic": 2 / math.sqrt(math.pi) * 2 * 0.044715}
    graph.initializer.extend(numpy_helper.from_array(np.float32(value), name) for name, value in factors.items())
    at = next(position for position, node in enumerate(graph.node) if node.output == erf.output)
    (u,), (result,) = erf.input, erf.output
    graph.node.remove(erf)
    steps = (
        ("Mul", [u, u], "tanh.square"),
        ("Mul", ["tanh.square", "tanh.cubic"], "tanh.factor"),
        ("Add", ["tanh.factor", "tanh.linear"], "tanh.slope"),
        ("Mul", ["tanh.slope", u], "tanh.inner"),
        ("Tanh", ["tanh.inner"], result),
    )
    for offset, (operator, inputs, output) in enumerate(steps):
        graph.node.insert(at + offset, helper.make_node(operator, inputs, [output]))
    onnx.save(model, path)
