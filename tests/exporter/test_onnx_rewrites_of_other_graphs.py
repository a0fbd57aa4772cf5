"""Graphs that lie beside what the rewrites take: left as they are, or rewritten to one that computes the same."""

from __future__ import annotations

import dataclasses
import re

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx_graphs import Graph, random

from npu_export import onnx_rewrites

HEADS = Graph(
    """joint = MatMul(x, w)
    linear = Add(joint, b)
    cut = Reshape(linear, apart)
    turned = Transpose<perm = [2, 0, 3, 1, 4]>(cut)
    s0 = Slice(turned, zero, one, zero)
    s1 = Slice(turned, one, two, zero)
    s2 = Slice(turned, two, three, zero)
    q = Squeeze(s0, zero)
    k = Squeeze(s1, zero)
    v = Squeeze(s2, zero)
    qk = Sub(q, k)
    y = Mul(qk, v)""",
    "float[2,4,8] x",
    "float[2,2,4,4] y",
    {"w": random(8, 24), "b": random(24), "apart": [2, 4, 3, 2, 4]},
)
ROTARY = Graph(
    """odd = Slice(x, one, end, last, two)
    neg = Neg(odd)
    even = Slice(x, zero, end, last, two)
    a = Unsqueeze(neg, last)
    b = Unsqueeze(even, last)
    stack = Concat<axis = -1>(a, b)
    turned = Reshape(stack, sizes)
    y = Sub(turned, x)""",
    "float[1,2,6,4] x",
    "float[1,2,6,4] y",
    {"sizes": [1, 2, 6, 4]},
)
APART = Graph(
    """first = Slice(x, zero, two, two)
    rest = Slice(x, two, end, two)
    scaled = Mul(rest, cosines)
    rotated = MatMul(rest, rotation)
    shifted = Mul(rotated, sines)
    total = Add(scaled, shifted)
    joined = Concat<axis = 2>(first, total)
    y = Neg(joined)""",
    "float[1,2,6,4] x",
    "float[1,2,6,4] y",
    {
        "cosines": random(4, 4),
        "sines": random(4, 4) * 2,
        "rotation": np.kron(np.eye(2), [[0, 1], [-1, 0]]).astype(np.float32),
    },
)
GELU = Graph(
    """scaled = Div(x, root)
    erf = Erf(scaled)
    total = Add(erf, unit)
    product = Mul(half, total)
    y = Mul(x, product)""",
    "float[3,8] x",
    "float[3,8] y",
    {"root": np.float32(2**0.5), "unit": np.float32(1), "half": np.float32(0.5)},
)
MLP = Graph(
    """hidden = MatMul(x, wide)
    active = Tanh(hidden)
    y = MatMul(active, narrow)""",
    "float[1,12,8] x",
    "float[1,12,4] y",
    {"wide": random(8, 1024), "narrow": random(1024, 4)},
)
SOFTMAX = Graph("weights = Softmax<axis = -1>(x) \n y = Neg(weights)", "float16[3,8] x", "float16[3,8] y")


def change(
    graph: Graph, *lines: tuple[str, str], constants: dict[str, object] | None = None, **fields: object
) -> Graph:
    """The graph with these pieces of text replaced, these constants, and other fields."""
    nodes = graph.nodes
    for old, new in lines:
        assert old in nodes
        nodes = nodes.replace(old, new)
    return dataclasses.replace(graph, nodes=nodes, constants={**graph.constants, **(constants or {})}, **fields)


APPLIED = {
    "heads": (HEADS, {"separate_heads": 1}),
    "rotary": (ROTARY, {"rotate_by_product": 1}),
    "apart": (APART, {"rotate_every_token": 1}),
    "gelu": (GELU, {"order_gelu": 1}),
    "mlp": (MLP, {"widen_products": 1}),
    "softmax": (SOFTMAX, {"widen_softmax": 1}),
    # a Slice may leave its axes out, and then means the first ones
    "heads cut without axes": (
        change(HEADS, ("zero, one, zero)", "zero, one)"), ("one, two, zero)", "one, two)")),
        {"separate_heads": 1},
    ),
    "heads of opset 12": (
        change(HEADS, *((f"Squeeze(s{i}, zero)", f"Squeeze<axes = [0]>(s{i})") for i in range(3)), opset=12),
        {"separate_heads": 1},
    ),
    "heads read in a body": (
        change(
            HEADS,
            (
                "y = Mul(qk, v)",
                """y = If(which) <then_branch = t () => (float[2,2,4,4] yes) { yes = Mul(qk, v) },
                else_branch = e () => (float[2,2,4,4] no) { no = Sub(qk, v) }>""",
            ),
            inputs="float[2,4,8] x, bool which",
        ),
        {"separate_heads": 1},
    ),
    "names that new nodes would have": (
        change(HEADS, ("(x,", "(val_0,"), inputs="float[2,4,8] val_0"),
        {"separate_heads": 1},
    ),
    "names that new constants would have": (
        change(
            HEADS,
            ("qk = Sub(q, k)", "w_8 = Add(q, heads_2_4_2_4)\n qk = Sub(w_8, k)"),
            constants={"heads_2_4_2_4": random(1, 4)},
        ),
        {"separate_heads": 1},
    ),
    "rotary of opset 12": (
        change(ROTARY, ("(neg, last)", "<axes = [-1]>(neg)"), ("(even, last)", "<axes = [-1]>(even)"), opset=12),
        {"rotate_by_product": 1},
    ),
    "rotary beside a constant of the matrix's name": (
        change(ROTARY, ("Sub(turned, x)", "Add(turned, rotation_4)"), constants={"rotation_4": random(4)}),
        {"rotate_by_product": 1},
    ),
    "rotary of two types": (
        change(
            ROTARY,
            (
                "y = Sub(turned, x)",
                """y = Sub(turned, x)
                odd16 = Slice(x16, one, end, last, two)
                neg16 = Neg(odd16)
                even16 = Slice(x16, zero, end, last, two)
                a16 = Unsqueeze(neg16, last)
                b16 = Unsqueeze(even16, last)
                stack16 = Concat<axis = -1>(a16, b16)
                turned16 = Reshape(stack16, sizes)
                y16 = Sub(turned16, x16)""",
            ),
            inputs="float[1,2,6,4] x, float16[1,2,6,4] x16",
            outputs="float[1,2,6,4] y, float16[1,2,6,4] y16",
        ),
        {"rotate_by_product": 2},
    ),
    "one table for cosines and sines": (
        change(APART, ("Mul(rotated, sines)", "Mul(rotated, cosines)")),
        {"rotate_every_token": 1},
    ),
    "tables from a Split without an axis": (
        change(
            APART,
            ("first =", "cos, sin = Split<num_outputs = 2>(tables)\n first ="),
            ("cosines", "cos"),
            ("sines", "sin"),
            constants={"tables": random(8, 4)},
        ),
        {"rotate_every_token": 1},
    ),
    "a constant times a weight": (
        change(
            MLP,
            ("MatMul(x, wide)", "MatMul(tokens, wide)"),
            ("y = MatMul(active, narrow)", "z = MatMul(active, narrow)\n y = Add(x, z)"),
            inputs="float[12,4] x",
            outputs="float[12,4] y",
            constants={"tokens": random(12, 8)},
        ),
        {"widen_products": 1},
    ),
    "a layer of a weight for each head": (
        change(MLP, constants={"wide": random(2, 8, 1024)}, inputs="float[2,12,8] x", outputs="float[2,12,4] y"),
        {"widen_products": 1},
    ),
    "layers one after the other": (
        change(
            MLP,
            ("y = MatMul(active", "middle = MatMul(active, square)\n y = MatMul(middle"),
            constants={"square": random(1024, 1024) / 32},
        ),
        {"widen_products": 2},
    ),
    "a product beside a constant of the pads' name": (
        change(MLP, ("Tanh(hidden)", "Mul(hidden, pads_6)"), constants={"pads_6": random(12, 1)}),
        {"widen_products": 1},
    ),
    "extra columns that would not be finite": (
        change(
            MLP,
            ("MatMul(x, wide)", "MatMul(x, wide)\n low = Add(hidden, row)\n near = Add(low, large)"),
            ("Tanh(hidden)", "Mul(near, large)"),
            constants={
                "wide": np.zeros((8, 1024), np.float32),
                "row": np.full(1024, -3e38, np.float32),
                "large": np.float32(3e38),
            },
        ),
        {"widen_products": 1},
    ),
    "extra columns that are divided by zero": (
        change(MLP, ("Tanh(hidden)", "Div(unit, hidden)"), constants={"unit": np.float32(1)}),
        {"widen_products": 1},
    ),
    "a softmax in a body": (
        Graph(
            """y = If(which) <then_branch = t () => (float16[3,8] yes) { s = Softmax<axis = 0>(x) yes = Neg(s) },
            else_branch = e () => (float16[3,8] no) { no = Neg(x) }>""",
            "float16[3,8] x, bool which",
            "float16[3,8] y",
            feeds={"which": np.array(True)},
        ),
        {"widen_softmax": 1},
    ),
    "a softmax of opset 12 without an axis": (
        change(SOFTMAX, ("<axis = -1>", ""), inputs="float16[3,4,2] x", outputs="float16[3,4,2] y", opset=12),
        {"widen_softmax": 1},
    ),
    "a softmax of an open shape": (
        change(SOFTMAX, inputs="float16[N,8] x", outputs="float16[N,8] y"),
        {"widen_softmax": 1},
    ),
    "a softmax that is rotated": (
        change(
            ROTARY,
            ("odd =", "scores = Softmax<axis = -1>(x) \n odd ="),
            ("Slice(x", "Slice(scores"),
            inputs="float16[1,2,6,4] x",
            outputs="float16[1,2,6,4] y",
        ),
        {"rotate_by_product": 1, "widen_softmax": 1},
    ),
}


@pytest.mark.parametrize("name", APPLIED)
def test_a_rewritten_graph_is_valid_and_computes_the_same(name: str) -> None:
    graph, expected = APPLIED[name]
    plain = graph.unchanged()
    rewritten, applied = graph.rewritten()
    for got, wanted in zip(graph.run(rewritten), graph.run(plain), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-3 if got.dtype == np.float16 else 1e-5, atol=1e-4)
    assert applied == expected
    again = onnx_rewrites.rewrite_for_onnxruntime(ir.from_proto(rewritten))
    assert again == {}


LEFT = {
    "a Transpose without perm": Graph("t = Transpose(x) \n y = Neg(t)", "float[2,3] x", "float[3,2] y"),
    "heads of a Slice from the end": change(HEADS, ("two, three, zero)", "last, three, zero)")),
    "heads of a Slice of opset 9": change(
        HEADS,
        *((f"Squeeze(s{i}, zero)", f"Squeeze<axes = [0]>(s{i})") for i in range(3)),
        ("(turned, zero, one, zero)", "<axes = [0], starts = [0], ends = [1]>(turned)"),
        ("(turned, one, two, zero)", "<axes = [0], starts = [1], ends = [2]>(turned)"),
        ("(turned, two, three, zero)", "<axes = [0], starts = [2], ends = [3]>(turned)"),
        opset=9,
    ),
    "heads of an unknown shape": change(HEADS, unknown=("cut",)),
    "heads of parts of unknown shapes": change(HEADS, unknown=("turned", "s0", "s1", "s2", "q", "k", "v")),
    "heads of an open batch": change(
        HEADS, inputs="float[N,4,8] x", outputs="float[N,2,4,4] y", constants={"apart": [-1, 4, 3, 2, 4]}
    ),
    "heads of rows": change(HEADS, inputs="float[8,8] x"),
    "heads of tokens that are cut as well": change(
        HEADS, inputs="float[2,12,8] x", constants={"w": random(8, 8), "b": random(8)}
    ),
    "heads of a weight for each image": change(HEADS, constants={"w": random(2, 8, 24)}),
    "heads of a bias for each token": change(HEADS, constants={"b": random(4, 1)}),
    "heads of a weight that a caller may replace": change(
        HEADS, inputs="float[2,4,8] x, float[8,24] w", feeds={"w": random(8, 24) * 3}
    ),
    "heads of a bias that a caller may replace": change(
        HEADS, inputs="float[2,4,8] x, float[24] b", feeds={"b": random(24) * 3}
    ),
    "heads of a Slice whose start a caller may replace": change(
        HEADS, ("(turned, one, ", "(turned, begin, "), inputs="float[2,4,8] x, int64[1] begin", constants={"begin": [1]}
    ),
    "heads of a weight that is an output": change(HEADS, outputs="float[2,2,4,4] y, float[8,24] w"),
    "heads of a weight that a body reads": change(
        HEADS,
        (
            "y = Mul(qk, v)",
            """z = Mul(qk, v)
            y = If(which) <then_branch = t () => (float[2,2,4,4] yes) { m = ReduceSum(w) yes = Add(z, m) },
            else_branch = e () => (float[2,2,4,4] no) { no = Neg(z) }>""",
        ),
        inputs="float[2,4,8] x, bool which",
        feeds={"which": np.array(True)},
    ),
    "heads of which one is cut twice": change(HEADS, ("(turned, one, two,", "(turned, zero, one,")),
    "heads of which one is an output": change(HEADS, outputs="float[2,2,4,4] y, float[2,2,4,4] q"),
    "heads of another order": change(HEADS, ("[2, 0, 3, 1, 4]", "[2, 1, 3, 0, 4]"), outputs="float[4,2,2,4] y"),
    "rotary of a Slice without steps": change(ROTARY, ("(x, one, end, last, two)", "(x, one, three, last)")),
    "rotary of Slices that keep their order": change(ROTARY, ("(x, one, end, last, two)", "(x, two, end, last, one)")),
    "rotary of a Slice from the end": change(
        ROTARY,
        ("(x, one, end, last, two)", "(x, last, begin, last, back)"),
        constants={"begin": [-(2**63)], "back": [-2]},
    ),
    "rotary of a Slice whose start a caller may replace": change(
        ROTARY,
        ("(x, one, ", "(x, begin, "),
        inputs="float[1,2,6,4] x, int64[1] begin",
        constants={"begin": [1]},
        feeds={"begin": np.array([0])},
    ),
    "rotary of integers": change(ROTARY, inputs="int8[1,2,6,4] x", outputs="int8[1,2,6,4] y"),
    "rotary of an open shape": change(
        ROTARY, inputs="float[N,2,6,4] x", outputs="float[N,2,6,4] y", constants={"sizes": [-1, 2, 6, 4]}
    ),
    "rotary that is an output": change(ROTARY, ("y = Sub(turned, x)", ""), ("turned =", "y =")),
    "tokens of every second": change(
        APART, ("(x, zero, two, two)", "(x, zero, four, two, two)"), constants={"four": [4]}
    ),
    "tokens in another order": change(
        APART,
        ("(x, two, end, two)", "(x, two, begin, two, last)"),
        inputs="float[1,2,5,4] x",
        outputs="float[1,2,5,4] y",
        constants={"begin": [-(2**63)], "cosines": random(3, 4), "sines": random(3, 4)},
    ),
    "one number for cosines": change(APART, constants={"cosines": np.float32(0.5)}),
    "tables from an uneven Split": change(
        APART,
        ("first =", "cos, other = Split<axis = 1, num_outputs = 2>(tables)\n first ="),
        ("cosines", "cos"),
        constants={"tables": random(4, 7)},
    ),
    "tables from a Split of opset 12": change(
        APART,
        ("first =", "cos, other = Split<axis = 0, split = [4, 3]>(tables)\n first ="),
        ("cosines", "cos"),
        constants={"tables": random(7, 4)},
        opset=12,
    ),
    "a table that a caller may replace": change(
        APART, inputs="float[1,2,6,4] x, float[4,4] sines", feeds={"sines": random(4, 4) * 5}
    ),
    "another matrix, in which the first tokens overflow": change(
        APART,
        constants={"rotation": np.full((4, 4), 1e38, np.float32), "sines": np.full((4, 4), 1e-38, np.float32)},
        feeds={"x": np.repeat(np.float32([100, 100, 0.1, 0.1, 0.1, 0.1]), 4).reshape(1, 1, 6, 4).repeat(2, 1)},
    ),
    "gelu whose other factor is computed later": change(GELU, ("y = Mul(x,", "late = Relu(x)\n y = Mul(late,")),
    "gelu whose other factor is in a body": change(
        GELU,
        (
            "y = Mul(x, product)",
            """y = If(which) <then_branch = t () => (float[3,8] yes) { late = Relu(x) yes = Mul(late, product) },
            else_branch = e () => (float[3,8] no) { no = Neg(x) }>""",
        ),
        inputs="float[3,8] x, bool which",
        feeds={"which": np.array(True)},
    ),
    "gelu of constants of more dims": change(
        GELU, constants={"half": np.full((1, 1, 1), 0.5, np.float32)}, outputs="float[1,3,8] y"
    ),
    "gelu of a constant that a caller may replace": change(
        GELU, inputs="float[3,8] x, float half", feeds={"half": np.array(0.25, np.float32)}
    ),
    "gelu of constants that nodes make": change(
        GELU,
        ("scaled =", "half = Constant<value_float = 0.5>()\n scaled ="),
        constants={"half": None},
    ),
    "gelu of another root": change(GELU, constants={"root": np.float32(1.5)}),
    "gelu squared": change(GELU, ("Mul(x, product)", "Mul(product, product)")),
    "gelu whose product is an output": change(GELU, outputs="float[3,8] y, float[3,8] product"),
    "a product of a weight for each head": change(
        MLP, constants={"narrow": random(2, 1024, 4)}, inputs="float[2,12,8] x", outputs="float[2,12,4] y"
    ),
    "a product of a weight that is an output": change(MLP, outputs="float[1,12,4] y, float[1024,4] narrow"),
    "a product of a weight that a caller may replace": change(
        MLP, inputs="float[1,12,8] x, float[1024,4] narrow", feeds={"narrow": random(1024, 4) * 3}
    ),
    "a product of a vector": change(MLP, constants={"narrow": random(1024)}, outputs="float[1,12] y"),
    "a product of opset 10": Graph(
        "y = MatMul(x, w)", "float[1,12,1024] x", "float[1,12,4] y", {"w": random(1024, 4)}, opset=10
    ),
    "a product of an open shape": change(MLP, inputs="float[N,12,8] x", outputs="float[N,12,4] y"),
    "a product of float64": change(
        MLP,
        inputs="double[1,12,8] x",
        outputs="double[1,12,4] y",
        constants={"wide": random(8, 1024, dtype=np.float64), "narrow": random(1024, 4, dtype=np.float64)},
    ),
    "a softmax of float64": change(
        SOFTMAX, inputs="double[1,4] x", outputs="double[1,4] y", feeds={"x": np.array([[1e300, 1e299, 0, -1e300]])}
    ),
    "a softmax that is an output": change(SOFTMAX, ("\n y = Neg(weights)", ""), ("weights", "y")),
    "a softmax of float32": change(SOFTMAX, inputs="float[3,8] x", outputs="float[3,8] y"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_graph_beside_what_is_known_stays_as_it_is(name: str) -> None:
    graph = LEFT[name]
    plain = graph.unchanged()
    rewritten, applied = graph.rewritten()
    for got, wanted in zip(graph.run(rewritten), graph.run(plain), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-3 if got.dtype == np.float16 else 1e-5, atol=1e-4)
    assert applied == {}
    assert rewritten.SerializeToString() == plain.SerializeToString()


def test_an_operator_of_another_domain_is_not_taken_for_the_one_of_its_name() -> None:
    graph = change(SOFTMAX, ("Softmax", "other.Softmax"))
    rewritten, applied = graph.rewritten()
    assert applied == {}
    assert rewritten.SerializeToString() == graph.unchanged().SerializeToString()


@pytest.mark.parametrize("name", ["rotary", "apart", "softmax"])
def test_bfloat16_is_taken_as_well(name: str) -> None:
    """Checked by its types alone: ONNX Runtime has no kernels of bfloat16 on the CPU."""
    graph, expected = APPLIED[name]
    signature = {"inputs": graph.inputs, "outputs": graph.outputs}
    constants = {key: to_bfloat16(value) for key, value in graph.constants.items()}
    half = {key: re.sub(r"float(16)?\[", "bfloat16[", text) for key, text in signature.items()}
    _, applied = change(graph, constants=constants, **half).rewritten()
    assert applied == expected


def to_bfloat16(content: object) -> object:
    return content.astype(ml_dtypes.bfloat16) if isinstance(content, np.ndarray) else content
