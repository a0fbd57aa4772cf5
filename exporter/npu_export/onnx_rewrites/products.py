"""Products whose rows do not lie a multiple of 4096 bytes apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from npu_export.onnx_rewrites.graph import (
    find_initializer,
    insert_node,
    is_own_constant,
    number_of,
    sizes_of,
    when_written,
)

ALIASING_WIDTH = 1024
"""Rows of this many float32, or of a multiple, lie a multiple of 4096 bytes apart: in one set of an L1 cache."""
EXTRA_COLUMNS = 16
"""A cache line of float32: each row begins in another set than the one before it."""
ROWS_AT_ONCE = 12
"""Rows that a step of onnxruntime's AVX-512 kernel reads side by side (core/mlas/lib/amd64/SgemmKernelAvx512F.asm)."""
COLUMN_BY_COLUMN = frozenset({"Add", "Mul", "Div", "Erf", "Sigmoid", "Tanh"})


def widen_products(model: ir.Model) -> None:
    """Have no float32 product read rows that lie a multiple of 4096 bytes apart, by columns of zeros.

    onnxruntime's kernel reads 12 rows of the activations side by side, as they lie in memory. At such a distance all
    are in one set of an L1 cache of 8 or 12 ways and push each other out: a product over 1024 columns then runs at
    three quarters of its rate. Where linear layers made the columns, they get weights of zeros for 16 more; elsewhere
    a Pad adds them. The weights that they meet in the product are zeros, so they add nothing.
    """
    products: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if _aliases(node):
            activation = node.inputs[0]
            assert activation is not None
            products.setdefault(activation, []).append(node)
    for activation, readers in products.items():
        layers = _column_by_column(activation, readers)
        *rows, width = sizes_of(activation)
        wider = (*rows, width + EXTRA_COLUMNS)
        if layers:
            for node in layers:
                for constant in filter(is_own_constant, node.inputs):
                    _append_zeros(constant, axis=-1)
                node.outputs[0].shape = ir.Shape((*sizes_of(node.outputs[0])[:-1], width + EXTRA_COLUMNS))
            padded = activation
        else:
            pads = np.array([0] * (2 * len(rows) + 1) + [EXTRA_COLUMNS])
            pads_value = find_initializer(model, f"pads_{len(pads)}", pads)
            padded = insert_node(readers[0], readers[0], "Pad", [activation, pads_value], wider)
        for node in readers:
            node.replace_input_with(0, padded)
            _append_zeros(node.inputs[1], axis=0)


def _aliases(node: ir.Node) -> bool:
    """Whether this is a float32 product with weights of its own that reads many rows of an aliasing width."""
    if node.op_type != "MatMul" or not is_own_constant(node.inputs[1]):
        return False
    activation = node.inputs[0]
    if activation is None or activation.dtype != ir.DataType.FLOAT:
        return False
    sizes = sizes_of(activation)
    return math.prod(sizes[:-1]) >= ROWS_AT_ONCE and sizes[-1] % ALIASING_WIDTH == 0


def _column_by_column(activation: ir.Value, readers: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes from linear layers to these readers, if a column of theirs comes from the same column of the layers.

    Empty if anything else makes, or reads, what lies between.
    """
    nodes: dict[ir.Node, None] = {}
    waiting: list[ir.Value] = [activation]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or value.is_graph_output() or sizes_of(value)[-1:] != sizes_of(activation)[-1:]:
            return []
        if node in nodes:
            continue
        nodes[node] = None
        if node.op_type == "MatMul" and is_own_constant(node.inputs[1]):
            continue
        if node.op_type not in COLUMN_BY_COLUMN:
            return []
        constants = [operand for operand in node.inputs if operand is not None and operand.const_value is not None]
        if node.op_type == "Div" and [number_of(operand) for operand in node.inputs[1:]] == [None]:
            return []  # zeros would be divided by zeros
        for constant in constants:
            whole_rows = is_own_constant(constant) and sizes_of(constant)[-1:] == sizes_of(activation)[-1:]
            if number_of(constant) is None and not whole_rows:
                return []
        waiting += [operand for operand in node.inputs if operand is not None and operand.const_value is None]
    read_by = {reader for node in nodes for reader, _ in node.outputs[0].uses()}
    return list(nodes) if read_by <= {*nodes, *readers} else []


def _append_zeros(constant: ir.Value | None, axis: int) -> None:
    """Make this constant larger by the extra rows (axis 0) or columns (axis -1)."""
    assert constant is not None
    pads = [(0, 0)] * len(sizes_of(constant))
    pads[axis] = (0, EXTRA_COLUMNS)
    shape = [size + after for size, (_, after) in zip(sizes_of(constant), pads)]
    constant.const_value = when_written(constant, lambda whole: np.pad(whole, pads), shape)
    constant.shape = ir.Shape(shape)
