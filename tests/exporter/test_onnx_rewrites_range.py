"""No rewrite changes which numbers a graph can hold: values at the end of each type's range come out as before."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_graphs import Graph, random

MAX = {np.float16: np.finfo(np.float16).max, np.float32: np.finfo(np.float32).max}
NAMES = {np.float16: "float16", np.float32: "float"}


def gelu(dtype: type[np.floating], sizes: int, x: np.ndarray) -> Graph:
    name = NAMES[dtype]
    return Graph(
        """scaled = Div(x, root)
        erf = Erf(scaled)
        total = Add(erf, unit)
        product = Mul(half, total)
        y = Mul(x, product)""",
        f"{name}[{sizes}] x",
        f"{name}[{sizes}] y",
        {"root": dtype(2**0.5), "unit": dtype(1), "half": dtype(0.5)},
        feeds={"x": x},
    )


def rotary(dtype: type[np.floating], x: np.ndarray) -> Graph:
    """Two tokens without a position before four with one, of angles 0, 90, 180 and 45 degrees."""
    cosines = np.repeat(np.array([1, 0, -1, 0.5]), 4).reshape(4, 4)
    sines = np.repeat(np.array([0, 1, 0, 0.5]), 4).reshape(4, 4)
    shape = ",".join(map(str, x.shape))
    return Graph(
        """first = Slice(x, zero, two, one)
        rest = Slice(x, two, end, one)
        scaled = Mul(rest, cosines)
        odd = Slice(rest, one, end, last, two)
        neg = Neg(odd)
        even = Slice(rest, zero, end, last, two)
        a = Unsqueeze(neg, last)
        b = Unsqueeze(even, last)
        stack = Concat<axis = -1>(a, b)
        rotated = Reshape(stack, sizes)
        shifted = Mul(rotated, sines)
        total = Add(scaled, shifted)
        joined = Concat<axis = 1>(first, total)
        y = Identity(joined)""",
        f"{NAMES[dtype]}[{shape}] x",
        f"{NAMES[dtype]}[{shape}] y",
        {"cosines": cosines.astype(dtype), "sines": sines.astype(dtype), "sizes": [1, 4, 4]},
        feeds={"x": x},
    )


def evaluate(graph: Graph, model: onnx.ModelProto) -> np.ndarray:
    """What the operators give one by one in their own type, where ONNX Runtime computes float16 in float32."""
    with np.errstate(all="ignore"):
        (y,) = ReferenceEvaluator(model).run(None, dict(graph.feeds))
    return np.asarray(y)


def test_gelu_gives_the_same_bits_for_every_float16() -> None:
    every = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    graph = gelu(np.float16, len(every), every)
    rewritten, applied = graph.rewritten()
    assert applied == {"order_gelu": 1}
    plain, ordered = evaluate(graph, graph.unchanged()), evaluate(graph, rewritten)
    assert ordered[every == 40_000] == 40_000
    np.testing.assert_array_equal(ordered, plain)  # NaN where torch's order has it
    np.testing.assert_array_equal(graph.run(rewritten)[0], graph.run(graph.unchanged())[0])


def test_gelu_gives_the_same_bits_from_end_to_end_of_float32() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32)
    ends = np.array([MAX[np.float32], 2e38, 1.5e38, 1e-38, 1e-45, 3e-45, 7e-45, np.inf, 0], np.float32)
    x = np.concatenate([bits.view(np.float32), ends, -ends])
    graph = gelu(np.float32, len(x), x)
    rewritten, _ = graph.rewritten()
    np.testing.assert_array_equal(graph.run(rewritten)[0], graph.run(graph.unchanged())[0])


def test_the_gelu_that_onnxruntime_fuses_holds_the_largest_float32() -> None:
    x = np.array([MAX[np.float32], 2e38, -MAX[np.float32], 1], np.float32)
    graph = gelu(np.float32, len(x), x)
    session = onnxruntime.InferenceSession(graph.rewritten()[0].SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, [MAX[np.float32], 2e38, 0, 0.8413447], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rotations_hold_the_largest_numbers(dtype: type[np.floating]) -> None:
    signs = np.sign(random(1, 6, 4))
    x = (signs * MAX[dtype]).astype(dtype)
    x[0, :, 1:3] = dtype(3)
    graph = rotary(dtype, x)
    rewritten, applied = graph.rewritten()
    assert applied == {"rotate_by_product": 1, "rotate_every_token": 1}
    plain = graph.run(graph.unchanged())[0]
    assert np.isfinite(plain).all()
    assert (np.abs(plain) == MAX[dtype]).any()
    np.testing.assert_array_equal(graph.run(rewritten)[0], plain)
    np.testing.assert_array_equal(evaluate(graph, rewritten), evaluate(graph, graph.unchanged()))


def test_an_infinity_spoils_its_own_token_alone() -> None:
    """Which attention makes of it anyway: a score that is infinite or NaN makes a row of the softmax NaN."""
    x = random(1, 6, 4)
    clean = rotary(np.float32, x.copy())
    x[0, 1, 2] = x[0, 3, 0] = np.inf
    graph = rotary(np.float32, x)
    y = graph.run(graph.rewritten()[0])[0]
    assert np.isnan(y[0, [1, 3]]).any()
    np.testing.assert_array_equal(y[0, [0, 2, 4, 5]], clean.run(clean.unchanged())[0][0, [0, 2, 4, 5]])


def test_a_wider_softmax_holds_the_largest_scores_and_masks() -> None:
    large = MAX[np.float16]
    rows = [[large, -large, 0, 1], [-large] * 4, [large] * 4, [-np.inf, 0, -np.inf, 0], [1, 2, 3, 4], [-np.inf] * 4]
    x = np.array(rows, np.float16)
    graph = Graph("weights = Softmax(x) \n y = Neg(weights)", "float16[6,4] x", "float16[6,4] y", feeds={"x": x})
    rewritten, applied = graph.rewritten()
    assert applied == {"widen_softmax": 1}
    plain = graph.run(graph.unchanged())[0]
    assert np.isfinite(plain[:5]).all()
    np.testing.assert_allclose(graph.run(rewritten)[0], plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layers", [True, False])
def test_wider_products_hold_the_largest_activations(layers: bool) -> None:
    wide, narrow = np.zeros((8, 1024), np.float32), np.zeros((1024, 4), np.float32)
    wide[np.arange(1024) % 8, np.arange(1024)] = 1
    narrow[[0, 1, 1022, 1023], [0, 1, 2, 3]] = [1, -1, 0.5, -0.5]
    x = np.full((1, 12, 8), MAX[np.float32])
    x[0, :, ::2] *= -1
    nodes = "hidden = MatMul(x, wide)\n active = Mul(hidden, unit)\n y = MatMul(active, narrow)"
    graph = Graph(
        nodes,
        "float[1,12,8] x",
        "float[1,12,4] y",
        {"wide": wide, "narrow": narrow, "unit": np.float32(1)},
        feeds={"x": x},
    )
    if not layers:
        graph = dataclasses.replace(graph, outputs="float[1,12,4] y, float[1,12,1024] active")
    rewritten, applied = graph.rewritten()
    assert applied == {"widen_products": 1}
    assert ("Pad" in {node.op_type for node in rewritten.graph.node}) != layers
    plain = graph.run(graph.unchanged())[0]
    np.testing.assert_array_equal(plain[0, 0], np.float32([-1, -1, -0.5, -0.5]) * MAX[np.float32])
    np.testing.assert_array_equal(graph.run(rewritten)[0], plain)
