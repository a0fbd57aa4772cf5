"""Will this program run on Ascend as it stands? Device literals, float64, opsets, open shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch

from npu_export.errors import LintError
from npu_export.torchscript import nodes_of

FLOAT64 = 7
"""Number of float64 among torch's scalar types (c10/core/ScalarType.h), as programs hold it."""


def lint_torchscript(program: torch.jit.ScriptModule, entry_points: Sequence[str]) -> None:
    """Raise LintError, all findings listed, unless the program is device-clean and free of float64.

    A device literal stays what it was when the program was traced: `map_location` moves tensors, not
    literals, so a program that holds `cpu` mixes devices elsewhere. Ascend has no float64.
    """
    findings = [
        f"{name}: {finding}"
        for name in ("forward", *entry_points)
        for finding in _graph_findings(getattr(program, name).graph)
    ]
    _refuse("TorchScript program", findings)


def lint_onnx(model: ir.Model, where: str) -> None:
    """Raise LintError unless the graph has fixed shapes, one opset and no float64."""
    findings = [f"opset of another domain: {domain}" for domain in model.opset_imports if domain]
    for node in model.graph.all_nodes():
        for value in node.outputs:
            findings += _value_findings(f"{node.op_type} {value.name}", value)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        findings += _value_findings(f"tensor {value.name}", value)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or not value.shape.is_static():
            findings.append(f"{value.name}: the shape is not fixed: {value.shape}")
    _refuse(f"ONNX graph {where}", findings)


def _refuse(what: str, findings: Sequence[str]) -> None:
    if findings:
        unique = list(dict.fromkeys(findings))
        raise LintError(
            f"the {what} would not run on Ascend as it stands",
            expected="no device literal, no float64, fixed shapes, one opset",
            got="\n".join(unique[:20]) + (f"\n… and {len(unique) - 20} more" if len(unique) > 20 else ""),
            hint="the network's forward makes these; build it without them (buffers in place of torch.arange, say)",
        )


def _graph_findings(graph: torch._C.Graph) -> Iterator[str]:
    for node in nodes_of(graph):
        if node.kind() == "prim::Constant":
            output = node.output()
            if "Device" in str(output.type()):
                yield f"device literal {node}".strip()
            elif _tensor_dtype(output) == torch.float64:
                yield f"float64 constant {output.debugName()}"
        elif float64 := _float64_arguments(node):
            yield f"float64 made by {node.kind()} ({', '.join(float64)})"


def _float64_arguments(node: torch._C.Node) -> list[str]:
    """Names of this operator's dtype arguments that are the constant float64."""
    schema = node.schema()
    if schema == "(no schema)":
        return []
    names = _argument_names(schema)
    return [
        name
        for name, value in zip(names, node.inputs())
        if name == "dtype" and value.node().kind() == "prim::Constant" and _constant(value) == FLOAT64
    ]


@functools.cache
def _argument_names(schema: str) -> tuple[str, ...]:
    return tuple(argument.name for argument in torch._C.parse_schema(schema).arguments)


def _tensor_dtype(value: torch._C.Value) -> torch.dtype | None:
    constant = _constant(value)
    return constant.dtype if isinstance(constant, torch.Tensor) else None


def _constant(value: torch._C.Value) -> object:
    """What a constant node holds; None where it holds None or what Python cannot show."""
    constant: object = value.toIValue()
    return constant


def _value_findings(name: str, value: ir.Value) -> Iterator[str]:
    dtypes = {value.dtype, value.const_value.dtype if value.const_value is not None else None}
    if ir.DataType.DOUBLE in dtypes:
        yield f"float64 in {name}"
