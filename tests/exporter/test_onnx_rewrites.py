from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from npu_export import onnx_rewrites
from npu_export.onnx import WEIGHTS_FILE, WeightsFile, export_graph, graph_file, write_graph
from npu_runtime.artifact.schema import TensorSpec

ROWS, WIDTH = 24, 32
INPUT = TensorSpec("x", "float32", ("B", ROWS, WIDTH))
REWRITES = ("separate_heads", "rotate_by_product", "rotate_every_token", "order_gelu", "widen_products")


class Attention(nn.Module):
    """Queries, keys and values from one layer, as timm and open_clip write it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, rows, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, rows, width)


class SharedAttention(Attention):
    """What the layer makes is also read as a whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.qkv(x)[..., :WIDTH]


class Rotary(nn.Module):
    """Rotary positions for all rows after the first ones, as timm writes them."""

    def __init__(self, without_position: int, sign: int = -1, doubled: bool = True) -> None:
        super().__init__()
        self.without_position, self.sign, self.doubled = without_position, sign, doubled
        angles = torch.randn(ROWS - without_position, WIDTH)
        self.register_buffer("tables", torch.cat([angles.sin(), angles.cos()], dim=-1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sin, cos = self.tables.tensor_split(2, -1)
        y = x[:, self.without_position :]
        rotated = torch.stack([self.sign * y[..., 1::2] if self.sign != -1 else -y[..., 1::2], y[..., ::2]], -1)
        turned = torch.cat([x[:, : self.without_position], y * cos + rotated.reshape(y.shape) * sin], dim=1)
        return 2 * turned if self.doubled else turned


class Mlp(nn.Module):
    """Two layers whose hidden width lies 4096 bytes from row to row."""

    def __init__(self, activation: nn.Module, hidden: int = 1024) -> None:
        super().__init__()
        self.wide, self.activation, self.narrow = nn.Linear(WIDTH, hidden), activation, nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.activation(self.wide(x)))


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 1024, bias=False), nn.Linear(WIDTH, 1024)
        self.down = nn.Linear(1024, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class NormedMlp(nn.Module):
    """What the second and third layer read depends on all columns of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Linear(WIDTH, 1024), nn.LayerNorm(1024)
        self.narrow, self.other = nn.Linear(1024, WIDTH), nn.Linear(1024, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.wide(x))
        return self.narrow(hidden) * self.other(hidden)


class SummedMlp(Mlp):
    """What lies between the layers is read by something else as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.wide(x))
        return self.narrow(hidden) + hidden.sum(-1, keepdim=True)


class ScaledMlp(Mlp):
    """A factor for each row, which has no columns to append to."""

    def __init__(self, computed: bool) -> None:
        super().__init__(nn.GELU())
        self.scale, self.to_scale = nn.Parameter(torch.rand(ROWS, 1)), nn.Linear(WIDTH, 1)
        self.computed = computed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.activation(self.wide(x)) * (self.to_scale(x) if self.computed else self.scale))


class TiedMlp(Mlp):
    """One weight in two products, one of which reads too few rows to be made wider."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.wide(x))
        return self.narrow(hidden) + self.narrow(hidden[:, :1])


Freeze = Callable[..., Path]


class InHalf(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x.half()).float()


@pytest.fixture
def freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Freeze:
    """Exports a module with these rewrites and no other, and gives the graph's path."""

    def run(module: nn.Module, *rewrites: str) -> Path:
        folder = tmp_path / "-".join(("graph", *rewrites))
        folder.mkdir()
        with monkeypatch.context() as patch:
            for name in set(REWRITES) - set(rewrites):
                patch.setattr(onnx_rewrites, name, lambda model: 0)
            graph, _ = export_graph(module.eval(), INPUT, [TensorSpec("y", "float32", INPUT.shape)], 1, 18)
        with (folder / WEIGHTS_FILE).open("wb") as file:
            write_graph(graph, WeightsFile(file), folder / graph_file(1))
        onnx.checker.check_model(str(folder / graph_file(1)), full_check=True)
        return folder / graph_file(1)

    return run


def operators(graph: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)


def output(graph: Path) -> np.ndarray:
    """What onnxruntime computes for the graph as it is written, without rewriting it further."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(3).standard_normal(INPUT.of_batch(1), np.float32)
    (y,) = session.run(None, {INPUT.name: x})
    return np.asarray(y)


def weights_shapes(graph: Path) -> dict[str, tuple[int, ...]]:
    return {
        tensor.name: tuple(tensor.dims)
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        if tensor.external_data
    }


@pytest.mark.parametrize("bias", [True, False])
def test_queries_keys_and_values_come_from_a_product_each_and_nothing_is_cut(freeze: Freeze, bias: bool) -> None:
    module = Attention(bias)
    plain, separate = freeze(module), freeze(module, "separate_heads")
    assert operators(plain)["Slice"] == 3
    assert operators(plain)["MatMul"] == 3
    assert operators(separate)["MatMul"] == 5
    assert operators(separate)["Add"] == 3 * bias
    assert not {"Slice", "Squeeze"} & set(operators(separate))
    assert sorted(weights_shapes(separate).values()) == [(WIDTH, WIDTH)] * 3
    np.testing.assert_allclose(output(separate), output(plain), rtol=0, atol=1e-6)


def test_a_product_that_something_else_reads_whole_is_not_taken_apart(freeze: Freeze) -> None:
    graph = freeze(SharedAttention(True), "separate_heads")
    assert list(weights_shapes(graph).values()).count((WIDTH, WIDTH)) == 0


@pytest.mark.parametrize("without_position", [0, 1, 5])
def test_rotary_positions_become_products_without_slices_and_no_bit_changes(
    freeze: Freeze, without_position: int
) -> None:
    module = Rotary(without_position)
    plain = freeze(module)
    rotated = freeze(module, "rotate_by_product")
    everywhere = freeze(module, "rotate_by_product", "rotate_every_token")
    slices = 2 * (without_position > 0)
    assert operators(plain)["Slice"] >= 2 + slices
    assert (operators(rotated)["Slice"], operators(rotated)["MatMul"]) == (slices, 1)
    assert not {"Slice", "Concat", "Neg", "Split"} & set(operators(everywhere)) or without_position == 0
    assert np.abs(output(plain)).max() > 1
    np.testing.assert_array_equal(output(rotated), output(plain))
    np.testing.assert_array_equal(output(everywhere), output(plain))


def test_an_output_of_the_graph_keeps_its_name(freeze: Freeze) -> None:
    module = Rotary(1, doubled=False)
    plain, rewritten = freeze(module), freeze(module, *REWRITES)
    assert operators(rewritten)["MatMul"] == 1
    assert [value.name for value in onnx.load(rewritten, load_external_data=False).graph.output] == ["y"]
    np.testing.assert_array_equal(output(rewritten), output(plain))


def test_another_turn_of_neighbours_is_left_as_it_is(freeze: Freeze) -> None:
    graph = freeze(Rotary(1, sign=1), *REWRITES)
    assert operators(graph)["MatMul"] == 0
    assert operators(graph)["Slice"] == 4


@pytest.mark.parametrize("module", [Mlp(nn.GELU()), Mlp(nn.SiLU()), Mlp(nn.Tanh()), GatedMlp()])
def test_hidden_columns_that_alias_get_more_columns_from_their_own_layers(freeze: Freeze, module: nn.Module) -> None:
    plain, wider = freeze(module), freeze(module, "widen_products")
    assert (1024, WIDTH) in weights_shapes(plain).values()
    assert operators(wider) == operators(plain)
    assert {size for shape in weights_shapes(wider).values() for size in shape} == {WIDTH, 1040}
    np.testing.assert_allclose(output(wider), output(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("module", [NormedMlp(), SummedMlp(nn.GELU()), ScaledMlp(True), ScaledMlp(False)])
def test_other_columns_that_alias_are_padded_once(freeze: Freeze, module: nn.Module) -> None:
    plain, wider = freeze(module), freeze(module, "widen_products")
    assert operators(wider) - operators(plain) == Counter({"Pad": 1})
    assert (1040, WIDTH) in weights_shapes(wider).values()
    assert (WIDTH, 1024) in weights_shapes(wider).values()
    np.testing.assert_allclose(output(wider), output(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("module", [Mlp(nn.GELU(), hidden=1000), TiedMlp(nn.GELU()), Mlp(nn.GELU()).half()])
def test_widths_that_do_not_alias_shared_weights_and_half_precision_stay(freeze: Freeze, module: nn.Module) -> None:
    wrapped = InHalf(module) if next(module.parameters()).dtype == torch.float16 else module
    plain, wider = freeze(wrapped), freeze(wrapped, "widen_products")
    assert plain.read_bytes() == wider.read_bytes()


def test_a_tensor_made_wider_holds_the_weights_and_zeros(freeze: Freeze) -> None:
    module = Mlp(nn.GELU())
    graph = onnx.load(freeze(module, "widen_products"))
    (weight,) = (t for t in graph.graph.initializer if tuple(t.dims) == (1040, WIDTH))
    rows = onnx.numpy_helper.to_array(weight)
    np.testing.assert_array_equal(rows[:1024], module.narrow.weight.detach().numpy().T)
    assert not rows[1024:].any()


def test_gelu_is_spelled_as_onnxruntime_fuses_it_and_no_bit_changes(freeze: Freeze, tmp_path: Path) -> None:
    module = Mlp(nn.GELU(), hidden=64)
    plain, ordered = freeze(module), freeze(module, "order_gelu")
    assert Counter(fused_operators(plain, tmp_path))["Erf"] == 1
    assert Counter(fused_operators(ordered, tmp_path))["Gelu"] == 1
    np.testing.assert_array_equal(output(ordered), output(plain))


def fused_operators(graph: Path, folder: Path) -> list[str]:
    """Operators that onnxruntime runs for a graph after its own rewriting."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(graph), options)
    return [node.op_type for node in onnx.load(folder / "optimised.onnx", load_external_data=False).graph.node]


def test_a_product_with_a_half_that_is_no_gelu_stays_as_it_is() -> None:
    class Halved(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            half = 0.5 * (1 + torch.erf(x))
            return x * half, half

    shape = TensorSpec("x", "float32", ("B", 8))
    model, _ = export_graph(Halved().eval(), shape, (shape, TensorSpec("half", "float32", ("B", 8))), 1, 18)
    half = model.graph.outputs[1].producer()
    assert half is not None
    assert any(value is not None and value.const_value is not None for value in half.inputs)


def test_a_graph_with_a_node_without_inputs_is_taken() -> None:
    constant = ir.node("Constant", [], {"value": ir.tensor(np.ones(3, np.float32))})
    total = ir.node("Add", [constant.outputs[0], constant.outputs[0]])
    graph = ir.Graph([], total.outputs, nodes=[constant, total], opset_imports={"": 18})
    onnx_rewrites.rewrite_for_onnxruntime(ir.Model(graph, ir_version=10))
    assert [node.op_type for node in graph] == ["Constant", "Add"]
