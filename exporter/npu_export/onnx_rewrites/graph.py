"""What rewrites of a graph share: what a value is and is made by, and new nodes and initializers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir


class GraphEditor:
    """Adds nodes and initializers to a graph, by names that nothing in it or in its subgraphs has."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = {
            value.name
            for graph in (model.graph, *model.graph.subgraphs())
            for values in (graph.inputs, graph.initializers.values(), *(node.outputs for node in graph))
            for value in values
        }
        self._initializers: dict[tuple[object, ...], ir.Value] = {}

    def insert(
        self,
        before: ir.Node,
        source: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: ir.Shape | Sequence[int] | None,
        *,
        dtype: ir.DataType | None = None,
        attributes: Mapping[str, ir.Attr | int | Sequence[int]] | None = None,
    ) -> ir.Value:
        """What a new node makes, in the dtype of its first input where none is given.

        `source` is the node that it stands in for, whose module it belongs to.
        """
        made = ir.Value(
            name=self._free_name(f"{source.outputs[0].name}_{op_type}"),
            shape=None if shape is None else ir.Shape(shape),
            type=None if (dtype := dtype or inputs[0].dtype) is None else ir.TensorType(dtype),
        )
        properties = dict(source.metadata_props)
        assert before.graph is not None
        node = ir.node(op_type, inputs, attributes, outputs=[made], metadata_props=properties)
        before.graph.insert_before(before, node)
        return made

    def find_constant(self, name: str, content: np.ndarray) -> ir.Value:
        """An initializer of this content, made the first time."""
        key = (content.dtype, content.shape, content.tobytes())
        if key not in self._initializers:
            self._initializers[key] = self.add_initializer(name, ir.tensor(content))
        return self._initializers[key]

    def add_initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer, by this name if it is free."""
        shape, dtype = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=self._free_name(name), shape=shape, type=dtype, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _free_name(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name


def when_written(constant: ir.Value, change: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]) -> ir.LazyTensor:
    """A tensor that is made of this constant each time it is read, so that no second copy of the weights is held."""
    tensor = constant.const_value
    assert tensor is not None
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(change(tensor.numpy()))), tensor.dtype, ir.Shape(shape), name=tensor.name
    )


def is_operator(node: ir.Node | None, op_type: str) -> bool:
    """Whether this node is ONNX's operator of this name, and not another domain's."""
    return node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx")


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes this value, if it is ONNX's operator of this name."""
    node = value.producer() if value is not None else None
    return node if is_operator(node, op_type) else None


def inner_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes whose results are no outputs of the graph, and so need not keep their names."""
    return [node for node in model.graph if not any(value.is_graph_output() for value in node.outputs)]


def has_one_reader(value: ir.Value) -> bool:
    """Whether one input of one node reads this, in the graph or in its subgraphs, and no caller does."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def sizes_of(value: ir.Value | None) -> tuple[int, ...]:
    """Its shape; empty if that is not known or not fixed, which no rewrite takes."""
    shape = value.shape if value is not None else None
    return shape.numpy() if shape is not None and shape.is_static() else ()


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What this holds in every run; None for what is computed, and for an initializer that a caller may replace."""
    return value.const_value if value is not None and not value.is_graph_input() else None


def content_of(value: ir.Value | None) -> np.ndarray:
    """What this holds: a constant, or an even Split of one; empty for any other value."""
    constant = tensor_of(value)
    if constant is not None:
        return constant.numpy()
    split = producer_of(value, "Split")
    whole = tensor_of(split.inputs[0]) if split is not None else None
    if value is None or split is None or whole is None or len(split.inputs) > 1 or "split" in split.attributes:
        return np.empty(0)
    attribute, count = split.attributes.get("axis"), len(split.outputs)
    axis = attribute.as_int() if attribute is not None else 0
    if whole.shape.numpy()[axis] % count:
        return np.empty(0)
    return np.split(whole.numpy(), count, axis)[split.outputs.index(value)]


def number_of(value: ir.Value | None) -> float | None:
    """What a constant of one element holds; None for any other value."""
    constant = tensor_of(value)
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None


def slice_start(node: ir.Node | None, step: int = 1) -> int | None:
    """Where a Slice of one axis starts, counted from the front, if it has this step; None for any other node."""
    if node is None or not is_operator(node, "Slice") or len(node.inputs) < 3:  # before opset 10 these are attributes
        return None
    start = number_of(node.inputs[1])
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    same = step == (1 if steps is None else number_of(steps))
    return int(start) if same and start is not None and start >= 0 else None


def is_own_constant(value: ir.Value | None) -> bool:
    """Whether this is an initializer of more than one element that one node reads, so that it may be changed."""
    if value is None or not value.is_initializer() or tensor_of(value) is None:
        return False
    return has_one_reader(value) and number_of(value) is None


def is_own_matrix(value: ir.Value | None) -> bool:
    """Whether this is such an initializer of two dims, [in, out] where it stands second in a product."""
    return is_own_constant(value) and len(sizes_of(value)) == 2
