"""Which rewrites each family of encoders gets."""

from __future__ import annotations

import pytest
import tiny

from npu_export.encoders.spec import EncoderSpec
from npu_export.encoders.vit import VitShape, vit_encoder
from npu_export.network import load_network, plan_weights
from npu_export.onnx import export_graph
from npu_export.precision import in_precision
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Precision

BLOCKS = 2
"""Of each tiny transformer; the convolutional one has 5. Queries and keys of each block are rotated apart."""
ATTENTION = {"separate_heads": BLOCKS, "order_gelu": BLOCKS}
HALF = {"widen_softmax": BLOCKS}
ROTARY = {"rotate_by_product": 2 * BLOCKS, "rotate_every_token": 2 * BLOCKS}


@pytest.mark.parametrize(
    ("encoder", "precision", "applied"),
    [
        (tiny.TINY, "fp32", ATTENTION),
        (tiny.TINY, "fp16", ATTENTION | HALF),
        (tiny.TINY_DINOV2, "fp32", ATTENTION),
        (tiny.TINY_CONVNEXT, "fp32", {"order_gelu": 5}),
        (tiny.TINY_CONVNEXT, "fp16", {"order_gelu": 5}),
        (tiny.TINY_AIMV2, "fp32", {"separate_heads": BLOCKS}),  # SiLU
        (tiny.TINY_PE_LANG, "fp32", ATTENTION | ROTARY),
        # the tables are float32 there, so casts lie between, and tokens without a position stay apart
        (tiny.TINY_PE_LANG, "fp16", ATTENTION | HALF | {"rotate_by_product": 2 * BLOCKS}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_each_family_gets_the_rewrites_that_are_for_it(
    encoder: EncoderSpec, precision: Precision, applied: dict[str, int]
) -> None:
    network = load_network(plan_weights(encoder, find_weights(encoder, "random:0")))
    module = in_precision(encoder.with_outputs(network), precision)
    assert export_graph(module, encoder.inputs[0], encoder.outputs, 1, 18)[1] == applied


def test_hidden_rows_that_alias_are_widened_and_opset_20_has_a_gelu_of_its_own() -> None:
    encoder = vit_encoder(tiny.TINY.published, VitShape(image=32, patch=8, width=256, depth=1, heads=4))
    network = load_network(plan_weights(encoder, find_weights(encoder, "random:0")))
    module = encoder.with_outputs(network)
    applied = {opset: export_graph(module, encoder.inputs[0], encoder.outputs, 1, opset)[1] for opset in (18, 20)}
    assert applied[18] == {"separate_heads": 1, "order_gelu": 1, "widen_products": 1}
    assert applied[20] == {"separate_heads": 1, "widen_products": 1}
