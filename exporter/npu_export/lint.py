"""Will this program run on Ascend as it stands? Device literals, float64, opsets, open shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch

from npu_export.errors import LintError
from npu_export.precision import torch_dtype
from npu_export.torchscript import nodes_of
from npu_runtime.artifact.schema import Precision

PRODUCTS = ("MatMul", "Gemm", "Conv")
"""ONNX operators in which a network computes almost all that it does: their types are its precision."""
ATEN_PRODUCTS = ("aten::linear", "aten::matmul", "aten::addmm", "aten::_convolution", "aten::conv2d")
FLOAT64 = 7
"""Number of float64 among torch's scalar types (c10/core/ScalarType.h), as programs hold it."""


def lint_torchscript(
    program: torch.jit.ScriptModule,
    entry_points: Sequence[str],
    precision: Precision,
    kept: Sequence[torch.Tensor] = (),
) -> None:
    """Raise LintError, all findings listed, unless the program is device-clean, of its precision and without float64.

    A device literal stays what it was when the program was traced: `map_location` moves tensors, not
    literals, so a program that holds `cpu` mixes devices elsewhere. Ascend has no float64. `kept` are the parameters
    that products have in float32 whatever the precision, and no others.
    """
    findings = [
        f"{name}: {finding}"
        for name in ("forward", *entry_points)
        for finding in (
            *_graph_findings(getattr(program, name).graph),
            *_other_precision(program, name, precision, kept),
        )
    ]
    _refuse("TorchScript program", findings)


def lint_onnx(model: ir.Model, where: str, precision: Precision, kept: Sequence[str] = ()) -> None:
    """Raise LintError unless the graph has fixed shapes, one opset, its precision and no float64.

    `kept` names the modules of the network that compute in float32 whatever the precision.
    """
    narrow = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    findings = [f"opset of another domain: {domain}" for domain in model.opset_imports if domain]
    for node in model.graph.all_nodes():
        for value in node.outputs:
            findings += _value_findings(f"{node.op_type} {value.name}", value)
        if node.op_type in PRODUCTS:
            wanted, name = (ir.DataType.FLOAT, "fp32") if _is_within(node, kept) else (narrow, precision)
            findings += [
                f"{node.op_type} {node.outputs[0].name} computes in {value.dtype}, not {name}"
                for value in (*node.inputs, *node.outputs)
                if value is not None and value.dtype != wanted
            ]
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        findings += _value_findings(f"tensor {value.name}", value)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or not value.shape.is_static():
            findings.append(f"{value.name}: the shape is not fixed: {value.shape}")
    _refuse(f"ONNX graph {where}", findings)


def _is_within(node: ir.Node, modules: Sequence[str]) -> bool:
    """Whether one of these modules of the network makes this node; torch's exporter names them from the outside in."""
    path = node.metadata_props.get("namespace", "").split("/")
    names = [part.partition(":")[0].rpartition("network.")[2] for part in path]
    return any(name in modules for name in names)


def _other_precision(
    program: torch.jit.ScriptModule, name: str, precision: Precision, kept: Sequence[torch.Tensor]
) -> Iterator[str]:
    """Products whose weights, constants of the program, have another type than the one asked for."""
    wanted = torch_dtype(precision)
    products = 0
    for node in nodes_of(getattr(program, name).graph):
        if node.kind() in ATEN_PRODUCTS:
            for value in node.inputs():
                tensor = _constant(value) if value.node().kind() == "prim::Constant" else None
                if not isinstance(tensor, torch.Tensor):
                    continue
                products += 1
                product = f"{node.kind()} {node.output().debugName()}"
                if tensor.dtype != wanted and not _is_one_of(tensor, kept):
                    yield f"{product} has a weight of {tensor.dtype}, not {precision}"
                if tensor.dtype == wanted != torch.float32 and tensor.ndim > 1 and _is_one_of(tensor, kept):
                    yield f"{product} has a weight of {tensor.dtype} that was to be kept in float32"
    if not products:
        yield "no product with a weight, whose type could be read"


def _is_one_of(tensor: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether this is one of the parameters, rounded to its type; what is all zeros is none of them."""
    alike = [parameter for parameter in parameters if parameter.shape == tensor.shape]
    return any(parameter.to(tensor.dtype).equal(tensor) for parameter in alike) and bool(tensor.any())


def _refuse(what: str, findings: Sequence[str]) -> None:
    if findings:
        unique = list(dict.fromkeys(findings))
        raise LintError(
            f"the {what} would not run on Ascend as it stands",
            expected="no device literal, no float64, fixed shapes, one opset, products in the precision asked for",
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
    names = argument_names(schema)
    return [
        name
        for name, value in zip(names, node.inputs())
        if name == "dtype" and value.node().kind() == "prim::Constant" and _constant(value) == FLOAT64
    ]


@functools.cache
def argument_names(schema: str) -> tuple[str, ...]:
    """Names of an operator's arguments, by the text of its schema."""
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
