"""Freeze a module to one TorchScript file with an entry point for each batch size."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning

from npu_runtime.artifact.schema import TensorSpec
from npu_runtime.torch_interop import without_jit_deprecation


def entry_point(batch: int) -> str:
    """Name of the method that takes this batch size."""
    return f"b{batch}"


def trace_frozen(module: nn.Module, pixel_values: TensorSpec, batches: Sequence[int]) -> torch.jit.ScriptModule:
    """The module traced at each batch size and frozen: methods `b1`, `b4`, … and `forward`, the first.

    The weights are constants, held once for all methods. Traced programs do not check their input:
    whoever calls one must.
    """
    entries = _with_entry_points(module, batches)
    dtype = getattr(torch, pixel_values.dtype)
    examples = {entry_point(b): torch.zeros(pixel_values.of_batch(b), dtype=dtype) for b in batches}
    examples["forward"] = examples[entry_point(batches[0])]
    with _known_warnings(), torch.no_grad():
        traced = torch.jit.trace_module(entries, examples, check_trace=False)
        frozen: torch.jit.ScriptModule = torch.jit.freeze(
            traced.eval(), preserved_attrs=[entry_point(b) for b in batches]
        )
    _forget_source_lines(frozen, [entry_point(b) for b in batches])
    return frozen


def empty_constants(program: torch.jit.ScriptModule, entry_points: Sequence[str]) -> None:
    """Let go of the weights that a saved program holds; it cannot run afterwards.

    torch keeps every frozen graph in a table of the process for good, and with it its constants.
    """
    for name in ("forward", *entry_points):
        for node in getattr(program, name).graph.findAllNodes("prim::Constant", recurse=True):
            if node.hasAttribute("value") and node.kindOf("value") == "t":
                node.t_("value", torch.empty(0))


def _forget_source_lines(program: torch.jit.ScriptModule, entry_points: Sequence[str]) -> None:
    """Drop the Python stack of each operator, which names paths of this machine and whoever called the export."""
    graph = torch._C.Graph()
    blank = graph.create("prim::Constant", [], 0)
    for name in ("forward", *entry_points):
        for node in nodes_of(getattr(program, name).graph):
            node.copyMetadata(blank)


def nodes_of(block: torch._C.Graph | torch._C.Block) -> Iterator[torch._C.Node]:
    """Every node of a graph, those of inner blocks too."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from nodes_of(inner)


def _with_entry_points(module: nn.Module, batches: Sequence[int]) -> nn.Module:
    """The module with a method for each batch size; tracing needs methods of the class itself."""

    def forward(self: Any, pixel_values: torch.Tensor) -> Any:
        return self.encoder(pixel_values)

    methods = {"forward": forward, **{entry_point(b): forward for b in batches}}
    entries: nn.Module = type("FrozenEncoder", (nn.Module,), methods)()
    entries.encoder = module
    return entries.eval()


@contextlib.contextmanager
def _known_warnings() -> Iterator[None]:
    """timm compares sizes, which tracing fixes as intended."""
    with without_jit_deprecation():
        warnings.filterwarnings("ignore", r"Converting a tensor to a Python (number|boolean)", TracerWarning)
        yield
