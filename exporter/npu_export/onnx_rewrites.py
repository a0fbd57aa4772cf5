"""Spell a graph as onnxruntime runs it faster or more exactly. What the graph computes stays what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

ALIASING_WIDTH = 1024
"""Rows of this many float32, or of a multiple, lie a multiple of 4096 bytes apart: in one set of an L1 cache."""
EXTRA_COLUMNS = 16
"""A cache line of float32: each row begins in another set than the one before it."""
ROWS_AT_ONCE = 12
"""Rows that a step of onnxruntime's AVX-512 kernel reads side by side (core/mlas/lib/amd64/SgemmKernelAvx512F.asm)."""
COLUMN_BY_COLUMN = frozenset({"Add", "Mul", "Div", "Erf", "Sigmoid", "Tanh"})


def rewrite_for_onnxruntime(model: ir.Model) -> None:
    """Apply every rewrite of this module in place."""
    separate_heads(model)
    rotate_by_product(model)
    rotate_every_token(model)
    RemoveUnusedNodesPass()(model)  # what nobody reads any more must not count as a reader below
    order_gelu(model)
    widen_products(model)
    widen_softmax(model)


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
        batch, tokens, _, heads, width = _sizes(reshape.outputs[0])
        columns = heads * width
        shape = _initializer(model, f"heads_{batch}_{tokens}_{heads}_{width}", np.array([batch, tokens, heads, width]))
        for index, part in parts.items():
            made = linear[0].inputs[0]
            for node in linear:
                third = _columns_of(model, node.inputs[1], index * columns, columns)
                made = _insert(cut, node, node.op_type, [made, third], (batch, tokens, columns))
            made = _insert(cut, reshape, "Reshape", [made, shape], (batch, tokens, heads, width))
            made = _insert(cut, cut, "Transpose", [made], (batch, heads, tokens, width), perm=(0, 2, 1, 3))
            ir.convenience.replace_all_uses_with(part, made)


def rotate_by_product(model: ir.Model) -> None:
    """Spell the rotation of rotary positions, (a, b) -> (-b, a) for neighbours, as a product with a constant matrix.

    torch spells it as slices of step 2, a stack and a reshape, which copy one number at a time. Of each sum in the
    product one term is not zero, so no result changes.
    """
    for node in _inner_nodes(model):
        x = _rotated(node)
        if x is not None and x.dtype is not None:
            width = _sizes(x)[-1]
            matrix = np.kron(np.eye(width // 2), [[0, 1], [-1, 0]]).astype(x.dtype.numpy())
            rotation = _initializer(model, f"rotation_{width}", matrix)
            product = _insert(node, node, "MatMul", [x, rotation], _sizes(x))
            ir.convenience.replace_all_uses_with(node.outputs[0], product)


def rotate_every_token(model: ir.Model) -> None:
    """Rotate tokens without a position, such as CLS, by an angle of zero, in place of setting them apart and back.

    x * 1 + rotated * 0 is x; what is saved is two copies of all queries and keys.
    """
    for joined in _inner_nodes(model):
        found = _rotated_apart(joined)
        if found is None:
            continue
        x, rotation, cosines, sines = found
        made = []
        for table, angle_of_zero in ((cosines, 1), (sines, 0)):
            content = _constant(table)
            apart = _sizes(x)[-2] - len(content)
            whole = np.pad(content, ((apart, 0), (0, 0)), constant_values=angle_of_zero)
            value = _initializer(model, f"{table.name}_{_sizes(x)[-2]}", whole)
            turned = x if angle_of_zero else _insert(joined, joined, "MatMul", [x, rotation], _sizes(x))
            made.append(_insert(joined, joined, "Mul", [turned, value], _sizes(x)))
        total = _insert(joined, joined, "Add", made, _sizes(x))
        ir.convenience.replace_all_uses_with(joined.outputs[0], total)


def order_gelu(model: ir.Model) -> None:
    """Spell GELU below opset 20 as `(x * (1 + erf(x / sqrt 2))) * 0.5`, which onnxruntime fuses.

    torch spells it `x * (0.5 * (1 + erf))`, which onnxruntime runs as five operators (its patterns are in
    core/optimizer/gelu_fusion.cc). Halving is exact, so no result changes.
    """
    for outer in model.graph.all_nodes():
        for x, product in _factors(outer):
            inner = product.producer()
            if inner is None or len(product.uses()) != 1 or product.is_graph_output():
                continue  # somebody else needs the product as it is
            for half, total in _factors(inner):
                if _number(half) == 0.5 and _adds_erf(total.producer()):
                    for node, inputs in ((inner, (x, total)), (outer, (product, half))):
                        for index, value in enumerate(inputs):
                            node.replace_input_with(index, value)
                    break


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
        *rows, width = _sizes(activation)
        wider = (*rows, width + EXTRA_COLUMNS)
        if layers:
            for node in layers:
                for constant in filter(_is_own_constant, node.inputs):
                    _append_zeros(constant, axis=-1)
                node.outputs[0].shape = ir.Shape((*_sizes(node.outputs[0])[:-1], width + EXTRA_COLUMNS))
            padded = activation
        else:
            pads = np.array([0] * (2 * len(rows) + 1) + [EXTRA_COLUMNS])
            pads_value = _initializer(model, f"pads_{len(pads)}", pads)
            padded = _insert(readers[0], readers[0], "Pad", [activation, pads_value], wider)
        for node in readers:
            node.replace_input_with(0, padded)
            _append_zeros(node.inputs[1], axis=0)


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


def _inner_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes whose results are no outputs of the graph, and so need not keep their names."""
    return [node for node in model.graph if not any(value.is_graph_output() for value in node.outputs)]


def _joint_product(cut: ir.Node) -> list[ir.Node] | None:
    """The MatMul, its Add if it has one, and the Reshape to [batch, tokens, 3, heads, width] that this node transposes.

    None unless nothing else reads what they make, and the weights are theirs alone.
    """
    reshape = _producer(cut.inputs[0], "Reshape")
    if reshape is None:
        return None
    bias = _producer(reshape.inputs[0], "Add")
    product = _producer((bias or reshape).inputs[0], "MatMul")
    if product is None:
        return None
    linear = [product] if bias is None else [product, bias]
    alone = all(len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output() for node in linear)
    return [*linear, reshape] if alone and all(_is_own_constant(node.inputs[1]) for node in linear) else None


def _parts(cut: ir.Node) -> dict[int, ir.Value]:
    """What Slice and Squeeze make of each index of the first axis, if this transposes [batch, tokens, 3, heads, width].

    Empty if anything else reads it.
    """
    if cut.op_type != "Transpose" or list(cut.attributes["perm"].as_ints()) != [2, 0, 3, 1, 4]:
        return {}
    parts: dict[int, ir.Value] = {}
    one = _sizes(cut.outputs[0])[1:]
    for slice_, _ in cut.outputs[0].uses():
        index = _number(slice_.inputs[1]) if slice_.op_type == "Slice" else None
        if index is None or _sizes(slice_.outputs[0]) != (1, *one):
            return {}
        for squeeze, _ in slice_.outputs[0].uses():
            if (
                squeeze.op_type != "Squeeze"
                or _sizes(squeeze.outputs[0]) != one
                or squeeze.outputs[0].is_graph_output()
            ):
                return {}
            parts[int(index)] = squeeze.outputs[0]
    return parts


def _rotated(node: ir.Node) -> ir.Value | None:
    """x if this node ends torch's `stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)`; its shapes tell axes."""
    stack = _producer(node.inputs[0], "Concat") if node.op_type == "Reshape" else None
    if stack is None or len(stack.inputs) != 2:
        return None
    first, second = (_producer(value, "Unsqueeze") for value in stack.inputs)
    negated = _producer(first.inputs[0], "Neg") if first is not None else None
    odd = _producer(negated.inputs[0], "Slice") if negated is not None else None
    even = _producer(second.inputs[0], "Slice") if second is not None else None
    if first is None or second is None or odd is None or even is None:
        return None
    x = odd.inputs[0]
    if x is None or x is not even.inputs[0] or not _sizes(x):
        return None
    *leading, width = _sizes(x)
    made = [(odd, ()), (even, ()), (first, (1,)), (second, (1,)), (stack, (2,))]
    halves = all(_sizes(part.outputs[0]) == (*leading, width // 2, *last) for part, last in made)
    starts_and_steps = [_number(part.inputs[index]) for part in (odd, even) for index in (1, 4)]
    same = _sizes(node.outputs[0]) == _sizes(x) and width % 2 == 0
    return x if same and halves and starts_and_steps == [1, 2, 0, 2] else None


def _rotated_apart(joined: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value] | None:
    """x, rotation, cosines and sines if this is `cat((x[..., :n, :], y * cosines + (y @ rotation) * sines), -2)`.

    y is x[..., n:, :], and the tables are constants of [tokens - n, width].
    """
    if joined.op_type != "Concat" or len(joined.inputs) != 2:
        return None
    apart, total = _producer(joined.inputs[0], "Slice"), _producer(joined.inputs[1], "Add")
    first, second = (_producer(value, "Mul") for value in total.inputs) if total is not None else (None, None)
    product = _producer(second.inputs[0], "MatMul") if second is not None else None
    rest = _producer(product.inputs[0], "Slice") if product is not None else None
    if apart is None or first is None or second is None or product is None or rest is None:
        return None
    x, rotation, cosines, sines = rest.inputs[0], product.inputs[1], first.inputs[1], second.inputs[1]
    if x is None or rotation is None or cosines is None or sines is None:
        return None
    *leading, width = _sizes(rest.outputs[0]) or (0,)
    with_position = len(_constant(cosines))
    without = _number(rest.inputs[1])
    fits = (
        x is apart.inputs[0]
        and first.inputs[0] is product.inputs[0]
        and leading[-1:] == [with_position]
        and _constant(cosines).shape == _constant(sines).shape == (with_position, width)
        and _number(apart.inputs[1]) == 0
        and without is not None
        and _sizes(apart.outputs[0]) == (*leading[:-1], int(without), width)
        and _sizes(joined.outputs[0]) == _sizes(x) == (*leading[:-1], int(without) + with_position, width)
    )
    return (x, rotation, cosines, sines) if fits else None


def _factors(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Both orders of the inputs of a Mul; nothing for other nodes."""
    if node.op_type != "Mul" or None in node.inputs:
        return []
    first, second = node.inputs
    assert first is not None
    assert second is not None
    return [(first, second), (second, first)]


def _adds_erf(node: ir.Node | None) -> bool:
    if node is None or node.op_type != "Add":
        return False
    return any(_producer(value, "Erf") is not None for value in node.inputs)


def _aliases(node: ir.Node) -> bool:
    """Whether this is a float32 product with weights of its own that reads many rows of an aliasing width."""
    if node.op_type != "MatMul" or not _is_own_constant(node.inputs[1]):
        return False
    activation = node.inputs[0]
    if activation is None or activation.dtype != ir.DataType.FLOAT:
        return False
    sizes = _sizes(activation)
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
        if node is None or value.is_graph_output() or _sizes(value)[-1:] != _sizes(activation)[-1:]:
            return []
        if node in nodes:
            continue
        nodes[node] = None
        if node.op_type == "MatMul" and _is_own_constant(node.inputs[1]):
            continue
        if node.op_type not in COLUMN_BY_COLUMN:
            return []
        constants = [operand for operand in node.inputs if operand is not None and operand.const_value is not None]
        if node.op_type == "Div" and [_number(operand) for operand in node.inputs[1:]] == [None]:
            return []  # zeros would be divided by zeros
        for constant in constants:
            whole_rows = _is_own_constant(constant) and _sizes(constant)[-1:] == _sizes(activation)[-1:]
            if _number(constant) is None and not whole_rows:
                return []
        waiting += [operand for operand in node.inputs if operand is not None and operand.const_value is None]
    read_by = {reader for node in nodes for reader, _ in node.outputs[0].uses()}
    return list(nodes) if read_by <= {*nodes, *readers} else []


def _append_zeros(constant: ir.Value | None, axis: int) -> None:
    """Make this constant larger by the extra rows (axis 0) or columns (axis -1)."""
    assert constant is not None
    pads = [(0, 0)] * len(_sizes(constant))
    pads[axis] = (0, EXTRA_COLUMNS)
    shape = [size + after for size, (_, after) in zip(_sizes(constant), pads)]
    constant.const_value = _when_written(constant, lambda whole: np.pad(whole, pads), shape)
    constant.shape = ir.Shape(shape)


def _columns_of(model: ir.Model, constant: ir.Value | None, first: int, count: int) -> ir.Value:
    """An initializer of these columns of another."""
    assert constant is not None
    shape = (*_sizes(constant)[:-1], count)
    columns = _when_written(constant, lambda whole: whole[..., first : first + count], shape)
    return _initializer(model, f"{constant.name}_{first}", columns)


def _when_written(
    constant: ir.Value, change: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]
) -> ir.LazyTensor:
    """A tensor that is made of this constant each time it is read, so that no second copy of the weights is held."""
    tensor = constant.const_value
    assert tensor is not None
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(change(tensor.numpy()))), tensor.dtype, ir.Shape(shape), name=tensor.name
    )


def _insert(
    before: ir.Node,
    source: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    shape: Sequence[int],
    perm: Sequence[int] | None = None,
) -> ir.Value:
    """What a new node makes in the dtype of its first input; `source` is the node whose module it belongs to."""
    attributes = {} if perm is None else {"perm": perm}
    node = ir.node(op_type, inputs, attributes, metadata_props=dict(source.metadata_props))
    (made,) = node.outputs
    made.shape = ir.Shape(shape)
    made.type = inputs[0].type if inputs[0] is not None else None
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return made


def _initializer(model: ir.Model, name: str, content: np.ndarray | ir.LazyTensor) -> ir.Value:
    """The initializer of this name, made the first time."""
    if name not in model.graph.initializers:
        tensor = ir.tensor(content) if isinstance(content, np.ndarray) else content
        shape, dtype = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        model.graph.register_initializer(ir.Value(name=name, shape=shape, type=dtype, const_value=tensor))
    return model.graph.initializers[name]


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes this value, if it is of this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """Its shape; empty if that is not known or not fixed, which no rewrite takes."""
    return value.shape.numpy() if value.shape is not None and value.shape.is_static() else ()


def _constant(value: ir.Value) -> np.ndarray:
    """What this holds: an initializer, or an even Split of one; empty for any other value."""
    if value.const_value is not None:
        return value.const_value.numpy()
    split = _producer(value, "Split")
    whole = split.inputs[0] if split is not None else None
    if split is None or whole is None or whole.const_value is None or len(split.inputs) > 1:
        return np.empty(0)
    parts = np.split(whole.const_value.numpy(), len(split.outputs), axis=split.attributes["axis"].as_int())
    return parts[split.outputs.index(value)]


def _number(value: ir.Value | None) -> float | None:
    """What a constant of one element holds; None for any other value."""
    constant = value.const_value if value is not None else None
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None


def _is_own_constant(value: ir.Value | None) -> bool:
    """Whether this is an initializer of more than one element that one node reads, so that it may be changed."""
    return value is not None and value.is_initializer() and len(value.uses()) == 1 and _number(value) is None
