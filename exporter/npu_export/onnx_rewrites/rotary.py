"""Rotary positions by a product, for every token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from npu_export.onnx_rewrites.graph import (
    GraphEditor,
    content_of,
    inner_nodes,
    is_operator,
    producer_of,
    sizes_of,
    slice_start,
)

FLOATING = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def rotate_by_product(model: ir.Model) -> int:
    """Spell the rotation of rotary positions, (a, b) -> (-b, a) for neighbours, as a product with a constant matrix.

    torch spells it as slices of step 2, a stack and a reshape, which copy one number at a time.

    Taken is `stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)`: Slices of one start and step each that are
    constants, Neg, Unsqueeze, Concat and a Reshape that is no output of the graph; x of a floating type, a fixed shape
    and an even width. Of each sum in the product one term is not zero, so a finite number stays what it is up to the
    largest, the sign of zero aside. A row that already holds an infinity or NaN becomes NaN as a whole, where slices
    move it: 0 * infinity is NaN. Returns how many rotations were spelled anew.
    """
    applied, editor = 0, GraphEditor(model)
    for node in inner_nodes(model):
        x = _rotated(node)
        if x is not None and x.dtype is not None:
            width = sizes_of(x)[-1]
            matrix = editor.find_constant(f"rotation_{width}", _rotation(width).astype(x.dtype.numpy()))
            product = editor.insert(node, node, "MatMul", [x, matrix], sizes_of(x))
            ir.convenience.replace_all_uses_with(node.outputs[0], product)
            applied += 1
    return applied


def rotate_every_token(model: ir.Model) -> int:
    """Rotate tokens without a position, such as CLS, by an angle of zero, in place of setting them apart and back.

    What is saved is two copies of all queries and keys.

    Taken is `cat((x[..., :n, :], y * cosines + (y @ rotation) * sines), -2)`, no output of the graph, where y is
    x[..., n:, :], the Slices start at constants and have a step of 1, the tables are constants of [tokens - n, width],
    and rotation is the matrix of `rotate_by_product`, which runs first. Shapes are fixed. x * 1 + rotated * 0 is x for
    every finite x, the sign of zero aside; a token that holds an infinity or NaN becomes NaN as a whole. Returns how
    many were rotated as a whole.
    """
    applied, editor = 0, GraphEditor(model)
    for joined in inner_nodes(model):
        found = _rotated_apart(joined)
        if found is None:
            continue
        sizes, terms = sizes_of(found.x), list[ir.Value]()
        rotated = editor.insert(joined, joined, "MatMul", [found.x, found.rotation], sizes)
        for factor, table, angle_of_zero in ((found.x, found.cosines, 1), (rotated, found.sines, 0)):
            content = content_of(table)
            whole = np.pad(content, ((sizes[-2] - len(content), 0), (0, 0)), constant_values=angle_of_zero)
            value = editor.find_constant(f"{table.name}_{sizes[-2]}", whole)
            terms.append(editor.insert(joined, joined, "Mul", [factor, value], sizes))
        total = editor.insert(joined, joined, "Add", terms, sizes)
        ir.convenience.replace_all_uses_with(joined.outputs[0], total)
        applied += 1
    return applied


def _rotation(width: int) -> np.ndarray:
    """R with (a, b) @ R = (-b, a) for each pair of neighbours."""
    return np.kron(np.eye(width // 2), [[0, 1], [-1, 0]])


def _rotated(node: ir.Node) -> ir.Value | None:
    """What this node ends the rotation of, if all is as `rotate_by_product` says; shapes tell the axes."""
    stack = producer_of(node.inputs[0], "Concat") if is_operator(node, "Reshape") else None
    if stack is None or len(stack.inputs) != 2:
        return None
    first, second = (producer_of(value, "Unsqueeze") for value in stack.inputs)
    negated = producer_of(first.inputs[0], "Neg") if first is not None else None
    odd = producer_of(negated.inputs[0], "Slice") if negated is not None else None
    even = producer_of(second.inputs[0], "Slice") if second is not None else None
    if first is None or second is None or odd is None or even is None:
        return None
    x = odd.inputs[0]
    if x is None or x is not even.inputs[0] or not sizes_of(x) or x.dtype not in FLOATING:
        return None
    *leading, width = sizes_of(x)
    made = [(odd, ()), (even, ()), (first, (1,)), (second, (1,)), (stack, (2,))]
    halves = all(sizes_of(part.outputs[0]) == (*leading, width // 2, *last) for part, last in made)
    same = sizes_of(node.outputs[0]) == sizes_of(x) and width % 2 == 0
    return x if same and halves and slice_start(odd, step=2) == 1 and slice_start(even, step=2) == 0 else None


@dataclass(frozen=True, slots=True)
class _RotatedApart:
    x: ir.Value
    rotation: ir.Value
    cosines: ir.Value
    sines: ir.Value


def _rotated_apart(joined: ir.Node) -> _RotatedApart | None:
    """What this node joins, if all is as `rotate_every_token` says; shapes tell the axes."""
    if not is_operator(joined, "Concat") or len(joined.inputs) != 2:
        return None
    apart, total = producer_of(joined.inputs[0], "Slice"), producer_of(joined.inputs[1], "Add")
    first, second = (producer_of(value, "Mul") for value in total.inputs) if total is not None else (None, None)
    product = producer_of(second.inputs[0], "MatMul") if second is not None else None
    rest = producer_of(product.inputs[0], "Slice") if product is not None else None
    if apart is None or first is None or second is None or product is None or rest is None:
        return None
    x, rotation, cosines, sines = rest.inputs[0], product.inputs[1], first.inputs[1], second.inputs[1]
    if x is None or rotation is None or cosines is None or sines is None:
        return None
    table, without = content_of(cosines), slice_start(rest)
    if table.ndim != 2 or without is None or x is not apart.inputs[0] or first.inputs[0] is not product.inputs[0]:
        return None
    with_position, width = table.shape
    leading = sizes_of(x)[:-2]
    fits = (
        slice_start(apart) == 0
        and sizes_of(apart.outputs[0]) == (*leading, without, width)
        and sizes_of(rest.outputs[0]) == (*leading, with_position, width)
        and sizes_of(joined.outputs[0]) == sizes_of(x) == (*leading, without + with_position, width)
        and content_of(sines).shape == table.shape
        and np.array_equal(content_of(rotation), _rotation(width))
    )
    return _RotatedApart(x, rotation, cosines, sines) if fits else None
