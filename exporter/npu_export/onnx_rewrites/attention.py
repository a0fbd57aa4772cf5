"""Heads apart from the first product on, rotary positions by a product, and the softmax in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from npu_export.onnx_rewrites.graph import (
    content_of,
    find_initializer,
    inner_nodes,
    insert_node,
    is_own_constant,
    number_of,
    producer_of,
    sizes_of,
    when_written,
)


def separate_heads(model: ir.Model) -> None:
    """Make queries, keys and values by a product each where one product makes all three, to be cut apart afterwards.

    The cut copies every number once more; a product of a third of the columns runs as fast as one of all.
    """
    for cut in list(model.graph):
        parts = _parts(cut)
        joint = _joint_product(cut) if parts else None
        if joint is None:
            continue
        linear, reshape = joint[:-1], joint[-1]
        batch, tokens, _, heads, width = sizes_of(reshape.outputs[0])
        columns = heads * width
        shape = find_initializer(
            model, f"heads_{batch}_{tokens}_{heads}_{width}", np.array([batch, tokens, heads, width])
        )
        for index, part in parts.items():
            made = linear[0].inputs[0]
            for node in linear:
                third = _columns_of(model, node.inputs[1], index * columns, columns)
                made = insert_node(cut, node, node.op_type, [made, third], (batch, tokens, columns))
            made = insert_node(cut, reshape, "Reshape", [made, shape], (batch, tokens, heads, width))
            made = insert_node(cut, cut, "Transpose", [made], (batch, heads, tokens, width), perm=(0, 2, 1, 3))
            ir.convenience.replace_all_uses_with(part, made)


def rotate_by_product(model: ir.Model) -> None:
    """Spell the rotation of rotary positions, (a, b) -> (-b, a) for neighbours, as a product with a constant matrix.

    torch spells it as slices of step 2, a stack and a reshape, which copy one number at a time. Of each sum in the
    product one term is not zero, so no result changes.
    """
    for node in inner_nodes(model):
        x = _rotated(node)
        if x is not None and x.dtype is not None:
            width = sizes_of(x)[-1]
            matrix = np.kron(np.eye(width // 2), [[0, 1], [-1, 0]]).astype(x.dtype.numpy())
            rotation = find_initializer(model, f"rotation_{width}_{matrix.dtype}", matrix)
            product = insert_node(node, node, "MatMul", [x, rotation], sizes_of(x))
            ir.convenience.replace_all_uses_with(node.outputs[0], product)


def rotate_every_token(model: ir.Model) -> None:
    """Rotate tokens without a position, such as CLS, by an angle of zero, in place of setting them apart and back.

    x * 1 + rotated * 0 is x; what is saved is two copies of all queries and keys.
    """
    for joined in inner_nodes(model):
        found = _rotated_apart(joined)
        if found is None:
            continue
        x, rotation, cosines, sines = found
        made = []
        for table, angle_of_zero in ((cosines, 1), (sines, 0)):
            content = content_of(table)
            apart = sizes_of(x)[-2] - len(content)
            whole = np.pad(content, ((apart, 0), (0, 0)), constant_values=angle_of_zero)
            value = find_initializer(model, f"{table.name}_{sizes_of(x)[-2]}", whole)
            turned = x if angle_of_zero else insert_node(joined, joined, "MatMul", [x, rotation], sizes_of(x))
            made.append(insert_node(joined, joined, "Mul", [turned, value], sizes_of(x)))
        total = insert_node(joined, joined, "Add", made, sizes_of(x))
        ir.convenience.replace_all_uses_with(joined.outputs[0], total)


def widen_softmax(model: ir.Model) -> None:
    """Have every softmax of a half-precision graph compute in float32, as torch's attention does inside.

    torch's exporter spells attention as products and a softmax in the type of its inputs, where
    `scaled_dot_product_attention` keeps the scores in float32 (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
    """
    for node in list(model.graph.all_nodes()):
        scores = node.inputs[0] if node.op_type == "Softmax" else None
        if scores is None or scores.dtype in (None, ir.DataType.FLOAT):
            continue
        result, narrow = node.outputs[0], scores.dtype
        widened = ir.node("Cast", [scores], attributes={"to": ir.DataType.FLOAT})
        narrowed = ir.node("Cast", [result], attributes={"to": narrow})
        for cast, dtype in ((widened, ir.DataType.FLOAT), (narrowed, narrow)):
            cast.outputs[0].dtype, cast.outputs[0].shape = dtype, scores.shape
        ir.convenience.replace_all_uses_with(result, narrowed.outputs[0])
        narrowed.replace_input_with(0, result)
        node.replace_input_with(0, widened.outputs[0])
        result.dtype = ir.DataType.FLOAT
        model.graph.insert_before(node, widened)
        model.graph.insert_after(node, narrowed)


def _joint_product(cut: ir.Node) -> list[ir.Node] | None:
    """The MatMul, its Add if it has one, and the Reshape to [batch, tokens, 3, heads, width] that this node transposes.

    None unless nothing else reads what they make, and the weights are theirs alone.
    """
    reshape = producer_of(cut.inputs[0], "Reshape")
    if reshape is None:
        return None
    bias = producer_of(reshape.inputs[0], "Add")
    product = producer_of((bias or reshape).inputs[0], "MatMul")
    if product is None:
        return None
    linear = [product] if bias is None else [product, bias]
    alone = all(len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output() for node in linear)
    return [*linear, reshape] if alone and all(is_own_constant(node.inputs[1]) for node in linear) else None


def _parts(cut: ir.Node) -> dict[int, ir.Value]:
    """What Slice and Squeeze make of each index of the first axis, if this transposes [batch, tokens, 3, heads, width].

    Empty if anything else reads it.
    """
    if cut.op_type != "Transpose" or list(cut.attributes["perm"].as_ints()) != [2, 0, 3, 1, 4]:
        return {}
    parts: dict[int, ir.Value] = {}
    one = sizes_of(cut.outputs[0])[1:]
    for slice_, _ in cut.outputs[0].uses():
        index = number_of(slice_.inputs[1]) if slice_.op_type == "Slice" else None
        if index is None or sizes_of(slice_.outputs[0]) != (1, *one):
            return {}
        for squeeze, _ in slice_.outputs[0].uses():
            if (
                squeeze.op_type != "Squeeze"
                or sizes_of(squeeze.outputs[0]) != one
                or squeeze.outputs[0].is_graph_output()
            ):
                return {}
            parts[int(index)] = squeeze.outputs[0]
    return parts


def _columns_of(model: ir.Model, constant: ir.Value | None, first: int, count: int) -> ir.Value:
    """An initializer of these columns of another."""
    assert constant is not None
    shape = (*sizes_of(constant)[:-1], count)
    columns = when_written(constant, lambda whole: whole[..., first : first + count], shape)
    return find_initializer(model, f"{constant.name}_{first}", columns)


def _rotated(node: ir.Node) -> ir.Value | None:
    """x if this node ends torch's `stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)`; its shapes tell axes."""
    stack = producer_of(node.inputs[0], "Concat") if node.op_type == "Reshape" else None
    if stack is None or len(stack.inputs) != 2:
        return None
    first, second = (producer_of(value, "Unsqueeze") for value in stack.inputs)
    negated = producer_of(first.inputs[0], "Neg") if first is not None else None
    odd = producer_of(negated.inputs[0], "Slice") if negated is not None else None
    even = producer_of(second.inputs[0], "Slice") if second is not None else None
    if first is None or second is None or odd is None or even is None:
        return None
    x = odd.inputs[0]
    if x is None or x is not even.inputs[0] or not sizes_of(x):
        return None
    *leading, width = sizes_of(x)
    made = [(odd, ()), (even, ()), (first, (1,)), (second, (1,)), (stack, (2,))]
    halves = all(sizes_of(part.outputs[0]) == (*leading, width // 2, *last) for part, last in made)
    starts_and_steps = [number_of(part.inputs[index]) for part in (odd, even) for index in (1, 4)]
    same = sizes_of(node.outputs[0]) == sizes_of(x) and width % 2 == 0
    return x if same and halves and starts_and_steps == [1, 2, 0, 2] else None


def _rotated_apart(joined: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value] | None:
    """x, rotation, cosines and sines if this is `cat((x[..., :n, :], y * cosines + (y @ rotation) * sines), -2)`.

    y is x[..., n:, :], and the tables are constants of [tokens - n, width].
    """
    if joined.op_type != "Concat" or len(joined.inputs) != 2:
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
    *leading, width = sizes_of(rest.outputs[0]) or (0,)
    with_position = len(content_of(cosines))
    without = number_of(rest.inputs[1])
    fits = (
        x is apart.inputs[0]
        and first.inputs[0] is product.inputs[0]
        and leading[-1:] == [with_position]
        and content_of(cosines).shape == content_of(sines).shape == (with_position, width)
        and number_of(apart.inputs[1]) == 0
        and without is not None
        and sizes_of(apart.outputs[0]) == (*leading[:-1], int(without), width)
        and sizes_of(joined.outputs[0]) == sizes_of(x) == (*leading[:-1], int(without) + with_position, width)
    )
    return (x, rotation, cosines, sines) if fits else None
