"""Spell a graph as onnxruntime runs it faster or more exactly. What the graph computes stays what it is.

Each rewrite says in its docstring what it takes, checks all of that before it changes anything, and returns how many
times it applied. What it does not know, such as an open shape, an operator of another domain or a constant that a
caller may replace, stays as it is.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from npu_export.onnx_rewrites.gelu import order_gelu
from npu_export.onnx_rewrites.heads import separate_heads
from npu_export.onnx_rewrites.products import widen_products
from npu_export.onnx_rewrites.rotary import rotate_by_product, rotate_every_token
from npu_export.onnx_rewrites.softmax import widen_softmax


def rewrite_for_onnxruntime(model: ir.Model) -> dict[str, int]:
    """Apply every rewrite in place, and return how many times each one applied that did."""
    applied = {
        "separate_heads": separate_heads(model),
        "rotate_by_product": rotate_by_product(model),
        "rotate_every_token": rotate_every_token(model),
    }
    if any(applied.values()):
        RemoveUnusedNodesPass()(model)  # what nobody reads any more must not count as a reader below
    applied |= {
        "order_gelu": order_gelu(model),
        "widen_products": widen_products(model),
        "widen_softmax": widen_softmax(model),
    }
    return {name: count for name, count in applied.items() if count}
