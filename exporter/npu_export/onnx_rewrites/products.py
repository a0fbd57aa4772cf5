"""Products whose rows do not lie a multiple of 4096 bytes apart."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from npu_export.onnx_rewrites.graph import (
    GraphEditor,
    is_operator,
    is_own_constant,
    is_own_matrix,
    number_of,
    sizes_of,
    tensor_of,
    when_written,
)

ALIASING_WIDTH = 1024
"""Rows of this many float32, or of a multiple, lie a multiple of 4096 bytes apart: in one set of an L1 cache."""
EXTRA_COLUMNS = 16
"""A cache line of float32: each row begins in another set than the one before it."""
ROWS_AT_ONCE = 12
"""Rows that a step of onnxruntime's AVX-512 kernel reads side by side (core/mlas/lib/amd64/SgemmKernelAvx512F.asm)."""
COLUMN_BY_COLUMN: Mapping[str, Callable[..., float]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Div": operator.truediv,
    "Erf": math.erf,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
}
PAD_OF_INPUTS = 11
"""The opset since which Pad takes its widths as an input."""


def widen_products(model: ir.Model) -> int:
    """Have no float32 product read rows that lie a multiple of 4096 bytes apart, by columns of zeros.

    onnxruntime's kernel reads 12 rows of the activations side by side, as they lie in memory. At such a distance all
    are in one set of an L1 cache of 8 or 12 ways and push each other out: a product over 1024 columns then runs at
    three quarters of its rate. Where linear layers made the columns, they get weights of zeros for 16 more; elsewhere
    a Pad adds them. The weights that they meet in the product are zeros, so they add nothing.

    Taken are MatMuls of float32, from opset 11 on, of activations of a fixed shape with a constant weight [in, out]
    that nothing else reads. Layers get columns if all that lies between them and the products treats each column by
    itself, what it makes of the extra columns is finite, and all else that it reads is a number or a constant row of
    its own. Where x is finite, no result overflows that did not. Where a layer reads an infinity, its extra columns are
    NaN, and so is the product, also behind a Tanh or Sigmoid that would have given a finite number. Returns how many
    products were widened.
    """
    applied, editor = 0, GraphEditor(model)
    if model.opset_imports.get("", 0) < PAD_OF_INPUTS:
        return 0
    products: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if _aliases(node):
            activation = node.inputs[0]
            assert activation is not None
            products.setdefault(activation, []).append(node)
    for activation, readers in products.items():
        layers = _column_by_column(activation, readers)
        *rows, width = sizes_of(activation)
        for node in layers:
            _append_columns(node)
        padded = activation
        if not layers:
            pads = np.array([0] * (2 * len(rows) + 1) + [EXTRA_COLUMNS], np.int64)
            pads_value = editor.find_constant(f"pads_{len(pads)}", pads)
            sizes = (*rows, width + EXTRA_COLUMNS)
            padded = editor.insert(readers[0], readers[0], "Pad", [activation, pads_value], sizes)
        for node in readers:
            node.replace_input_with(0, padded)
            _append_zeros(node.inputs[1], axis=0)
        applied += len(readers)
    return applied


def _aliases(node: ir.Node) -> bool:
    """Whether this is a float32 product with weights of its own that reads many rows of an aliasing width."""
    if not is_operator(node, "MatMul") or not is_own_matrix(node.inputs[1]):
        return False
    activation = node.inputs[0]
    if activation is None or activation.dtype != ir.DataType.FLOAT:
        return False
    sizes = sizes_of(activation)
    return math.prod(sizes[:-1]) >= ROWS_AT_ONCE and sizes[-1] > 0 and sizes[-1] % ALIASING_WIDTH == 0


def _column_by_column(activation: ir.Value, readers: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes from linear layers to these readers, if a column of theirs comes from the same column of the layers.

    Empty if anything else makes, or reads, what lies between, or if the extra columns would not be finite.
    """
    nodes: set[ir.Node] = set()
    waiting: list[ir.Value] = [activation]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or value.is_graph_output() or sizes_of(value)[-1:] != sizes_of(activation)[-1:]:
            return []
        if node in nodes:
            continue
        nodes.add(node)
        if is_operator(node, "MatMul") and is_own_matrix(node.inputs[1]):
            continue
        if not any(is_operator(node, op_type) for op_type in COLUMN_BY_COLUMN):
            return []
        for operand in node.inputs:
            assert operand is not None
            if tensor_of(operand) is None:
                waiting.append(operand)
            elif number_of(operand) is None and not _is_own_row(operand, activation):
                return []
    read_by = {reader for node in nodes for reader, _ in node.outputs[0].uses()}
    if not read_by <= {*nodes, *readers}:
        return []
    ordered = [node for node in readers[0].graph or () if node in nodes]
    return ordered if np.isfinite(_extra_columns(ordered)).all() else []


def _is_own_row(constant: ir.Value, activation: ir.Value) -> bool:
    return is_own_constant(constant) and sizes_of(constant)[-1:] == sizes_of(activation)[-1:]


def _extra_columns(nodes: Sequence[ir.Node]) -> list[np.float32]:
    """What each of these nodes, in the graph's order, makes of columns for which the layers have zeros."""
    made: dict[ir.Value | None, np.float32] = {}
    with np.errstate(all="ignore"):
        for node in nodes:
            if node.op_type == "MatMul":
                made[node.outputs[0]] = np.float32(0)
                continue
            operands = [made.get(value, np.float32(number_of(value) or 0)) for value in node.inputs]
            made[node.outputs[0]] = np.float32(COLUMN_BY_COLUMN[node.op_type](*operands))
    return list(made.values())


def _append_columns(node: ir.Node) -> None:
    """Have one of the nodes from a layer to a product make the extra columns."""
    for constant in node.inputs[1:] if node.op_type == "MatMul" else node.inputs:
        if is_own_constant(constant):
            _append_zeros(constant, axis=-1)
    *rows, width = sizes_of(node.outputs[0])
    node.outputs[0].shape = ir.Shape((*rows, width + EXTRA_COLUMNS))


def _append_zeros(constant: ir.Value | None, axis: int) -> None:
    """Make this constant larger by the extra rows (axis 0) or columns (axis -1)."""
    assert constant is not None
    pads = [(0, 0)] * len(sizes_of(constant))
    pads[axis] = (0, EXTRA_COLUMNS)
    shape = [size + after for size, (_, after) in zip(sizes_of(constant), pads)]
    constant.const_value = when_written(constant, lambda whole: np.pad(whole, pads), shape)
    constant.shape = ir.Shape(shape)
