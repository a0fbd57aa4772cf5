"""Queries, keys and values apart from the first product on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from npu_export.onnx_rewrites.graph import (
    GraphEditor,
    has_one_reader,
    is_operator,
    is_own_constant,
    is_own_matrix,
    producer_of,
    sizes_of,
    slice_start,
    when_written,
)


def separate_heads(model: ir.Model) -> int:
    """Make queries, keys and values by a product each where one product makes all three, to be cut apart afterwards.

    The cut copies every number once more; a product of a third of the columns runs as fast as one of all.

    Taken is `x @ weight`, with or without `+ bias`, then a Reshape to [batch, tokens, parts, heads, width], a Transpose
    to [parts, batch, heads, tokens, width], and for each part that is read one Slice and Squeeze, which nothing else
    reads. Shapes are fixed; weight [in, parts * heads * width] and bias are constants that only these nodes read.
    A number is the same sum as before, so its range is too. Returns how many products were taken apart.
    """
    applied, editor = 0, GraphEditor(model)
    for transpose in list(model.graph):
        joint = _joint_product(transpose)
        if joint is None:
            continue
        applied += 1
        batch, tokens, _, heads, width = sizes_of(joint.reshape.outputs[0])
        columns = heads * width
        apart = np.array([batch, tokens, heads, width], np.int64)
        shape = editor.find_constant(f"heads_{batch}_{tokens}_{heads}_{width}", apart)
        for index, part in joint.parts.items():
            made = joint.x
            for node, constant in joint.linear:
                third = _columns_of(editor, constant, index * columns, columns)
                made = editor.insert(transpose, node, node.op_type, [made, third], (batch, tokens, columns))
            made = editor.insert(transpose, joint.reshape, "Reshape", [made, shape], (batch, tokens, heads, width))
            sizes = (batch, heads, tokens, width)
            made = editor.insert(transpose, transpose, "Transpose", [made], sizes, attributes={"perm": (0, 2, 1, 3)})
            ir.convenience.replace_all_uses_with(part, made)
    return applied


@dataclass(frozen=True, slots=True)
class _JointProduct:
    """What one product makes, and how it is cut."""

    x: ir.Value
    linear: tuple[tuple[ir.Node, ir.Value], ...]
    """The MatMul, and the Add if there is one, each with its constant."""
    reshape: ir.Node
    parts: dict[int, ir.Value]
    """What Slice and Squeeze make of each index of the first axis."""


def _joint_product(transpose: ir.Node) -> _JointProduct | None:
    """The product whose result this node transposes, if all is as `separate_heads` says."""
    perm = transpose.attributes.get("perm") if is_operator(transpose, "Transpose") else None
    reshape = producer_of(transpose.inputs[0], "Reshape") if perm is not None else None
    if perm is None or reshape is None or list(perm.as_ints()) != [2, 0, 3, 1, 4]:
        return None
    bias = producer_of(reshape.inputs[0], "Add")
    product = producer_of(bias.inputs[0] if bias is not None else reshape.inputs[0], "MatMul")
    sizes = sizes_of(reshape.outputs[0])
    if product is None or len(sizes) != 5:
        return None
    batch, tokens, parts, heads, width = sizes
    x, weight, offset = product.inputs[0], product.inputs[1], None if bias is None else bias.inputs[1]
    nodes = [product, reshape] if bias is None else [product, bias, reshape]
    columns = parts * heads * width
    if x is None or weight is None or not is_own_matrix(weight) or not all(has_one_reader(n.outputs[0]) for n in nodes):
        return None
    if any(sizes_of(node.outputs[0]) != (batch, tokens, columns) for node in nodes[:-1]):
        return None
    linear = [(product, weight)]
    if bias is not None:
        if offset is None or not is_own_constant(offset) or sizes_of(offset)[-1:] != (columns,):
            return None
        linear.append((bias, offset))
    found = _parts(transpose, (batch, heads, tokens, width))
    return _JointProduct(x, tuple(linear), reshape, found) if found else None


def _parts(transpose: ir.Node, sizes: tuple[int, ...]) -> dict[int, ir.Value]:
    """What Slice and Squeeze make of each index of the first axis; empty if anything else reads it."""
    whole, parts = transpose.outputs[0], dict[int, ir.Value]()
    if whole.is_graph_output():
        return {}
    for slice_, _ in whole.uses():
        index, one = slice_start(slice_), slice_.outputs[0]
        if index is None or index in parts or sizes_of(one) != (1, *sizes) or not has_one_reader(one):
            return {}
        ((squeeze, _),) = one.uses()
        part = squeeze.outputs[0]
        if not is_operator(squeeze, "Squeeze") or sizes_of(part) != sizes or part.is_graph_output():
            return {}
        parts[index] = part
    return parts


def _columns_of(editor: GraphEditor, constant: ir.Value, first: int, count: int) -> ir.Value:
    """An initializer of these columns of another."""
    shape = (*sizes_of(constant)[:-1], count)
    columns = when_written(constant, lambda whole: whole[..., first : first + count], shape)
    return editor.add_initializer(f"{constant.name}_{first}", columns)
