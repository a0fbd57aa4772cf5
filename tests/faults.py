"""Faults planted in frozen programs: what a wrong freeze, a damaged file or a careless rewrite would leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npu_runtime.torch_interop import without_jit_deprecation

Change = Callable[[list[Any]], None]
"""Of the nodes of a TorchScript method."""


def change_torchscript(path: Path, change: Change) -> None:
    """Change the nodes of every method of a frozen TorchScript file."""
    with without_jit_deprecation(), torch.no_grad():
        program = torch.jit.load(str(path))
        done: set[int] = set()
        for name in program._c._method_names():
            nodes = list(_nodes(getattr(program, name).graph))
            weights = [
                node
                for node in nodes
                if node.kind() == "prim::Constant" and node.output().type().kind() == "TensorType"
            ]
            if weights and weights[0].t("value").data_ptr() in done:  # methods share their weights
                nodes = [node for node in nodes if node not in weights]
            change(nodes)
            done.update(node.t("value").data_ptr() for node in weights)
        torch.jit.save(program, str(path))


def tensors_of(nodes: list[Any]) -> list[torch.Tensor]:
    """The constant tensors among nodes, in order; changing one in place changes the program."""
    return [
        node.t("value")
        for node in nodes
        if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t"
    ]


def change_a_weight(nodes: list[Any]) -> None:
    for tensor in _middle_weight(nodes):
        tensor.view(-1)[7] += 0.05


def plant_nan(nodes: list[Any]) -> None:
    for tensor in _middle_weight(nodes):
        tensor.view(-1)[7] = float("nan")


def tanh_gelu(nodes: list[Any]) -> None:
    """GELU by tanh in place of the exact one."""
    for node in nodes:
        if node.kind() == "aten::gelu":
            list(node.inputs())[1].node().s_("value", "tanh")


def change_onnx_weight(folder: Path) -> None:
    """One value in the largest of the shared weights."""
    file = folder / "weights.onnx.data"
    data = np.fromfile(file, np.float32)
    pages = np.flatnonzero(data[: len(data) // 1024 * 1024].reshape(-1, 1024).any(axis=1))
    data[1024 * pages[len(pages) // 2]] += 0.05
    data.tofile(file)


def _middle_weight(nodes: list[Any]) -> list[torch.Tensor]:
    """A matrix half-way through the program; none where the weights were left out."""
    matrices = [tensor for tensor in tensors_of(nodes) if tensor.is_floating_point() and tensor.dim() == 2]
    return matrices[len(matrices) // 2 :][:1]


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
