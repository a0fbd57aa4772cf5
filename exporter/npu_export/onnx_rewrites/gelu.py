"""GELU in the order of operators that onnxruntime fuses."""

from __future__ import annotations

import onnx_ir as ir

from npu_export.onnx_rewrites.graph import number_of, producer_of


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
                if number_of(half) == 0.5 and _adds_erf(total.producer()):
                    for node, inputs in ((inner, (x, total)), (outer, (product, half))):
                        for index, value in enumerate(inputs):
                            node.replace_input_with(index, value)
                    break


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
    return any(producer_of(value, "Erf") is not None for value in node.inputs)
