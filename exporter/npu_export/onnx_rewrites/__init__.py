"""Spell a graph as onnxruntime runs it faster or more exactly. What the graph computes stays what it is."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from npu_export.onnx_rewrites.attention import rotate_by_product, rotate_every_token, separate_heads, widen_softmax
from npu_export.onnx_rewrites.gelu import order_gelu
from npu_export.onnx_rewrites.products import widen_products


def rewrite_for_onnxruntime(model: ir.Model) -> None:
    """Apply every rewrite in place."""
    separate_heads(model)
    rotate_by_product(model)
    rotate_every_token(model)
    RemoveUnusedNodesPass()(model)  # what nobody reads any more must not count as a reader below
    order_gelu(model)
    widen_products(model)
    widen_softmax(model)
