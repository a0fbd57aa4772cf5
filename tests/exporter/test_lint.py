from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import onnx_ir as ir
import pytest
import tiny
import torch
from torch import nn

from npu_export.errors import LintError
from npu_export.lint import lint_onnx, lint_torchscript
from npu_export.network import load_network, plan_weights
from npu_export.onnx import export_graph
from npu_export.precision import in_precision, torch_dtype
from npu_export.torchscript import trace_frozen
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Precision, TensorSpec

INPUT, OUTPUTS = tiny.TINY.inputs[0], tiny.TINY.outputs
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


class Forward(nn.Module):
    """A module that computes what it is given, after a product in float32."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.product = nn.Conv2d(3, 3, 1)
        self.function = function

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.function(self.product(pixel_values))


class Float64Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Conv2d(3, 3, 1)
        self.register_buffer("scale", torch.full((3, 1, 1), 0.5, dtype=torch.float64))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return (self.product(pixel_values) * self.scale).to(torch.float32)


class Products(nn.Module):
    """A convolution and a linear layer, each with a type of its own."""

    def __init__(self, convolution: torch.dtype, linear: torch.dtype) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1, dtype=convolution)
        self.linear = nn.Linear(32, 64, dtype=linear)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.convolution(pixel_values.to(self.convolution.weight.dtype))
        return self.linear(features.to(self.linear.weight.dtype)).float().sum((1, 2))


def _branching(x: torch.Tensor) -> torch.Tensor:
    """A cast inside a branch, which tracing alone does not make."""
    return torch.jit.script(_branch)(x)


def _branch(x: torch.Tensor) -> torch.Tensor:
    if bool(x.sum() > 0):
        return x.sum(1, dtype=torch.float64).to(torch.float32)
    return x.sum(1)


def lint(module: nn.Module, precision: Precision = "fp32") -> None:
    lint_torchscript(trace_frozen(module.eval(), INPUT, (1, 2)), ["b1", "b2"], precision)


def lint_graph(module: nn.Module, outputs: Sequence[TensorSpec], precision: Precision = "fp32") -> None:
    model, _ = export_graph(module.eval(), INPUT, outputs, 1, 18)
    lint_onnx(model, "model.b1.onnx", precision)


def tiny_module(precision: Precision) -> nn.Module:
    network = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:0")))
    return in_precision(tiny.TINY.with_outputs(network), precision)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.arange(x.shape[1])[None, :, None, None],
        lambda x: x + torch.zeros(x.shape),
        lambda x: x + torch.zeros_like(x, device="cpu"),
        lambda x: x.to("cpu", torch.float16).to(torch.float32),
    ],
    ids=["arange", "zeros", "zeros_like", "to"],
)
def test_a_device_literal_is_found_in_every_entry_point(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(LintError, match="would not run on Ascend") as raised:
        lint(Forward(function))
    for name in ("forward", "b1", "b2"):
        assert f"{name}: device literal" in str(raised.value.got)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.float64).sum(1).to(torch.float32),
        lambda x: x.double().sum(1).float(),
        lambda x: torch.softmax(x, 1, dtype=torch.float64).float(),
        lambda x: x.sum(1, dtype=torch.float64).float(),
    ],
    ids=["to", "double", "softmax", "sum"],
)
def test_a_float64_cast_is_found(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(LintError) as raised:
        lint(Forward(function))
    assert "float64 made by aten::" in str(raised.value.got)


def test_a_float64_constant_is_found() -> None:
    with pytest.raises(LintError) as raised:
        lint(Float64Buffer())
    assert "float64 constant" in str(raised.value.got)


# torch.jit.script, deprecated like the rest of torch.jit, is the only way to make a branch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is not supported:FutureWarning")
def test_a_float64_cast_inside_a_branch_is_found() -> None:
    with pytest.raises(LintError, match="would not run on Ascend") as raised:
        lint(Forward(_branching))
    assert "float64 made by aten::sum" in str(raised.value.got)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2.0,
        lambda x: x.to(torch.float16).to(torch.float32),
        lambda x: torch.softmax(x, 1, dtype=torch.float32),
        lambda x: x.new_zeros(3, 1, 1) + x if False else x.flatten(1),
    ],
    ids=["scalar", "half", "softmax", "flatten"],
)
def test_a_clean_program_passes(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert lint(Forward(function)) is None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tiny_encoder_is_clean(precision: Precision) -> None:
    assert lint(tiny_module(precision), precision) is None


@pytest.mark.parametrize(("made", "asked"), list(itertools.permutations(PRECISIONS, 2)))
def test_a_program_of_another_precision_than_was_asked_for_is_refused(made: Precision, asked: Precision) -> None:
    with pytest.raises(LintError, match="products in the precision asked for") as raised:
        lint(tiny_module(made), asked)
    for name in ("forward", "b1", "b2"):
        assert re.search(
            rf"^{name}: aten::linear \S+ has a weight of {torch_dtype(made)}, not {asked}$",
            str(raised.value.got),
            re.MULTILINE,
        )


def test_one_product_of_another_type_in_a_program_is_found_and_no_other() -> None:
    assert lint(Products(torch.float16, torch.float16), "fp16") is None
    with pytest.raises(LintError) as raised:
        lint(Products(torch.float16, torch.float32), "fp16")
    findings = str(raised.value.got).splitlines()
    assert [finding.split()[:2] for finding in findings] == [[f"{n}:", "aten::linear"] for n in ("forward", "b1", "b2")]


def test_a_program_without_a_product_whose_type_can_be_read_is_refused() -> None:
    with pytest.raises(LintError) as raised:
        lint(nn.Flatten())
    assert "forward: no product with a weight" in str(raised.value.got)


def small_graph(
    dtype: ir.DataType = ir.DataType.FLOAT,
    shape: tuple[int | str, ...] = (1, 3),
    opsets: dict[str, int] | None = None,
    constant: ir.TensorProtocol | None = None,
) -> ir.Model:
    """x -> Relu -> hidden -> Relu -> y, where `dtype` is the hidden value's."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    hidden = ir.node("Relu", [x])
    hidden.outputs[0].name, hidden.outputs[0].dtype = "hidden", dtype
    last = ir.node("Relu", [hidden.outputs[0]])
    y = last.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(shape)
    graph = ir.Graph([x], [y], nodes=[hidden, last], opset_imports=opsets or {"": 18}, name="main")
    if constant is not None:
        graph.register_initializer(ir.Value(name="c", const_value=constant))
    return ir.Model(graph, ir_version=10)


def test_a_clean_graph_passes() -> None:
    constant = ir.tensor([1.0], dtype=ir.DataType.FLOAT, name="c")
    assert lint_onnx(small_graph(constant=constant), "model.b1.onnx", "fp32") is None


@pytest.mark.parametrize(
    ("graph", "finding"),
    [
        (small_graph(dtype=ir.DataType.DOUBLE), "float64 in Relu hidden"),
        (
            small_graph(constant=ir.tensor([1.0], dtype=ir.DataType.DOUBLE, name="c")),
            "float64 in tensor c",
        ),
        (small_graph(opsets={"": 18, "com.microsoft": 1}), "opset of another domain: com.microsoft"),
        (small_graph(shape=("batch", 3)), "x: the shape is not fixed"),
    ],
    ids=["float64 value", "float64 tensor", "second opset", "open shape"],
)
def test_what_ascend_does_not_take_is_found_in_a_graph(graph: ir.Model, finding: str) -> None:
    with pytest.raises(LintError, match=r"ONNX graph model\.b1\.onnx") as raised:
        lint_onnx(graph, "model.b1.onnx", "fp32")
    assert finding in str(raised.value.got)


def test_a_float64_network_is_found_in_its_graph() -> None:
    with pytest.raises(LintError) as raised:
        lint_graph(Float64Buffer(), OUTPUTS[:1])
    assert "float64 in" in str(raised.value.got)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tiny_encoders_graph_is_clean(precision: Precision) -> None:
    assert lint_graph(tiny_module(precision), OUTPUTS, precision) is None


@pytest.mark.parametrize(("made", "asked"), [("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_a_graph_of_another_precision_than_was_asked_for_is_refused(made: Precision, asked: Precision) -> None:
    with pytest.raises(LintError, match="products in the precision asked for") as raised:
        lint_graph(tiny_module(made), OUTPUTS, asked)
    onnx_name = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}[made]
    assert re.search(rf"^MatMul \S+ computes in {onnx_name}, not {asked}$", str(raised.value.got), re.MULTILINE)


def test_one_product_of_another_type_in_a_graph_is_found_and_no_other() -> None:
    assert lint_graph(Products(torch.float16, torch.float16), OUTPUTS[:1], "fp16") is None
    with pytest.raises(LintError) as raised:
        lint_graph(Products(torch.float16, torch.float32), OUTPUTS[:1], "fp16")
    assert {finding.split()[0] for finding in str(raised.value.got).splitlines()} <= {"MatMul", "Gemm"}


def test_every_finding_is_listed_up_to_a_bound() -> None:
    def many(x: torch.Tensor) -> torch.Tensor:
        for power in range(30):
            x = x.sum(-1, keepdim=True, dtype=torch.float64).float() + power
        return x

    with pytest.raises(LintError) as raised:
        lint_graph(Forward(many), OUTPUTS[:1])
    lines = str(raised.value.got).splitlines()
    assert len(lines) == 21
    assert lines[-1].startswith("… and ")
