"""GELU in the order of operators that onnxruntime fuses."""

from __future__ import annotations

import math

import onnx_ir as ir

from npu_export.onnx_rewrites.graph import has_one_reader, is_operator, number_of, producer_of


def order_gelu(model: ir.Model) -> int:
    """Spell GELU below opset 20 as `(x * 0.5) * (1 + erf(x / sqrt 2))`, which onnxruntime fuses.

    torch spells it `x * (0.5 * (1 + erf))`, which onnxruntime runs as five operators (its patterns are in
    core/optimizer/gelu_fusion.cc).

    Taken is that spelling, the inputs of each Mul and Add in either order, of one x whose shape the products have as
    well, where 0.5, 1 and sqrt 2 are constants and nothing else reads `0.5 * (1 + erf)`. No bit changes in any floating
    type: halving is exact but for numbers so small that 1 + erf is 1, and nothing becomes larger than it was, unlike in
    `(x * (1 + erf)) * 0.5`, which onnxruntime fuses as well. Returns how many were spelled anew.
    """
    applied = 0
    for outer in list(model.graph.all_nodes()):
        for x, product in _operands(outer, "Mul"):
            inner = producer_of(product, "Mul")
            if inner is None or not has_one_reader(product):
                continue
            found = [(half, total) for half, total in _operands(inner, "Mul") if number_of(half) == 0.5]
            if found and _adds_one_to_erf(found[0][1], x) and x.shape == product.shape == found[0][1].shape:
                half, total = found[0]
                for node, inputs in ((inner, (x, half)), (outer, (product, total))):
                    for index, value in enumerate(inputs):
                        node.replace_input_with(index, value)
                applied += 1
                break
    return applied


def _operands(node: ir.Node | None, op_type: str) -> list[tuple[ir.Value, ir.Value]]:
    """Both orders of the inputs of this operator; nothing for other nodes."""
    if node is None or not is_operator(node, op_type):
        return []
    first, second = node.inputs
    assert first is not None
    assert second is not None
    return [(first, second), (second, first)]


def _adds_one_to_erf(total: ir.Value, x: ir.Value) -> bool:
    """Whether this is `1 + erf(x / sqrt 2)`."""
    for erf, one in _operands(producer_of(total, "Add"), "Add"):
        node = producer_of(erf, "Erf")
        division = producer_of(node.inputs[0], "Div") if node is not None else None
        root = number_of(division.inputs[1]) if division is not None and division.inputs[0] is x else None
        # float16 and bfloat16 hold sqrt 2 to three digits
        if number_of(one) == 1 and root is not None and math.isclose(root, math.sqrt(2), rel_tol=1e-3):
            return True
    return False
