"""The softmax of half-precision graphs in float32."""

from __future__ import annotations

import onnx_ir as ir

from npu_export.onnx_rewrites.graph import GraphEditor, is_operator

HALF_PRECISION = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def widen_softmax(model: ir.Model) -> int:
    """Have every softmax of a half-precision graph compute in float32, as torch's attention does inside.

    torch's exporter spells attention as products and a softmax in the type of its inputs, where
    `scaled_dot_product_attention` keeps the scores in float32 (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).

    Taken is a Softmax over any axis, in subgraphs too, of scores declared float16 or bfloat16, whose result is no
    output of its graph. float32 holds every score, and what comes out lies between 0 and 1. Returns how many were
    widened.
    """
    applied, editor = 0, GraphEditor(model)
    for node in list(model.graph.all_nodes()):
        scores = node.inputs[0] if is_operator(node, "Softmax") else None
        if scores is None or scores.dtype not in HALF_PRECISION or node.outputs[0].is_graph_output():
            continue
        wide, narrow = ir.DataType.FLOAT, scores.dtype
        made = editor.insert(node, node, "Cast", [scores], scores.shape, dtype=wide, attributes={"to": wide})
        made = editor.insert(node, node, "Softmax", [made], scores.shape, attributes=node.attributes)
        made = editor.insert(node, node, "Cast", [made], scores.shape, dtype=narrow, attributes={"to": narrow})
        ir.convenience.replace_all_uses_with(node.outputs[0], made)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        applied += 1
    return applied
