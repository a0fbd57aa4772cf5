"""What rewrites of a graph share: what a value is and is made by, and new nodes and initializers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir


def insert_node(
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


def find_initializer(model: ir.Model, name: str, content: np.ndarray | ir.LazyTensor) -> ir.Value:
    """The initializer of this name, made the first time."""
    if name not in model.graph.initializers:
        tensor = ir.tensor(content) if isinstance(content, np.ndarray) else content
        shape, dtype = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        model.graph.register_initializer(ir.Value(name=name, shape=shape, type=dtype, const_value=tensor))
    return model.graph.initializers[name]


def when_written(constant: ir.Value, change: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]) -> ir.LazyTensor:
    """A tensor that is made of this constant each time it is read, so that no second copy of the weights is held."""
    tensor = constant.const_value
    assert tensor is not None
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(change(tensor.numpy()))), tensor.dtype, ir.Shape(shape), name=tensor.name
    )


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes this value, if it is of this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def inner_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes whose results are no outputs of the graph, and so need not keep their names."""
    return [node for node in model.graph if not any(value.is_graph_output() for value in node.outputs)]


def sizes_of(value: ir.Value) -> tuple[int, ...]:
    """Its shape; empty if that is not known or not fixed, which no rewrite takes."""
    return value.shape.numpy() if value.shape is not None and value.shape.is_static() else ()


def content_of(value: ir.Value) -> np.ndarray:
    """What this holds: an initializer, or an even Split of one; empty for any other value."""
    if value.const_value is not None:
        return value.const_value.numpy()
    split = producer_of(value, "Split")
    whole = split.inputs[0] if split is not None else None
    if split is None or whole is None or whole.const_value is None or len(split.inputs) > 1:
        return np.empty(0)
    parts = np.split(whole.const_value.numpy(), len(split.outputs), axis=split.attributes["axis"].as_int())
    return parts[split.outputs.index(value)]


def number_of(value: ir.Value | None) -> float | None:
    """What a constant of one element holds; None for any other value."""
    constant = value.const_value if value is not None else None
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None


def is_own_constant(value: ir.Value | None) -> bool:
    """Whether this is an initializer of more than one element that one node reads, so that it may be changed."""
    return value is not None and value.is_initializer() and len(value.uses()) == 1 and number_of(value) is None
