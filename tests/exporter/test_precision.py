from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
from torch import nn

from npu_export.encoders.spec import EncoderSpec
from npu_export.errors import LintError
from npu_export.lint import lint_onnx, lint_torchscript
from npu_export.network import load_network, plan_weights
from npu_export.onnx import export_graph
from npu_export.precision import (
    OPERATORS,
    castable_modules,
    in_precision,
    operators_without_kernel,
    require_kernels,
    torch_dtype,
)
from npu_export.proof.limits import UNIT_ROUNDOFF
from npu_export.torchscript import trace_frozen
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Precision
from npu_runtime.errors import UnavailableError, UsageError

HALVES: tuple[Precision, ...] = ("fp16", "bf16")


def module_of(encoder: EncoderSpec) -> torch.nn.Module:
    return encoder.with_outputs(load_network(plan_weights(encoder, find_weights(encoder, "random:0"))))


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_every_parameter_takes_the_type_and_no_buffer_does(encoder: EncoderSpec, precision: Precision) -> None:
    module = module_of(encoder)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    changed = in_precision(module, precision)
    assert {parameter.dtype for parameter in changed.parameters()} == {torch_dtype(precision)}
    for name, buffer in changed.named_buffers():
        assert torch.equal(buffer, buffers[name.removeprefix("encoder.")])


def test_an_encoder_with_rotary_positions_has_buffers_to_keep() -> None:
    assert [buffer.dtype for buffer in module_of(tiny.TINY_PE_LANG).buffers()]


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_inputs_and_outputs_stay_float32_and_the_outputs_are_near_those_of_float32(
    encoder: EncoderSpec, precision: Precision
) -> None:
    images = torch.randn(encoder.inputs[0].of_batch(2), generator=torch.Generator().manual_seed(0))
    module = module_of(encoder)
    with torch.inference_mode():
        expected = module(images)
        got = in_precision(module, precision)(images)
    for exact, rounded in zip(expected, got):
        assert rounded.dtype == torch.float32
        share = ((rounded - exact).norm() / exact.norm()).item()
        assert UNIT_ROUNDOFF[precision] / 4 < share < 10 * UNIT_ROUNDOFF[precision]


def test_fp32_is_the_module_itself() -> None:
    module = module_of(tiny.TINY)
    assert in_precision(module, "fp32") is module
    assert in_precision(module, "fp32", ["blocks.1"]) is module


@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_modules_with_weights_may_be_kept_in_float32(encoder: EncoderSpec) -> None:
    assert list(castable_modules(module_of(encoder).network)) == tiny.BOUNDARIES[encoder.name]


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_kept_modules_alone_have_float32_weights(encoder: EncoderSpec, precision: Precision) -> None:
    kept = tiny.BOUNDARIES[encoder.name][1:3]
    changed = in_precision(module_of(encoder), precision, kept)
    network = changed.encoder.network
    inside = {id(parameter) for name in kept for parameter in network.get_submodule(name).parameters()}
    assert inside
    for parameter in changed.parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in inside else torch_dtype(precision))


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_frozen_programs_with_kept_modules_give_what_eager_gives_and_pass_lint(
    encoder: EncoderSpec, position: str
) -> None:
    names = tiny.BOUNDARIES[encoder.name]
    kept = {"first": names[:1], "middle": names[2:3], "last": names[-2:]}[position]
    images = torch.randn(encoder.inputs[0].of_batch(1), generator=torch.Generator().manual_seed(0))
    changed = in_precision(module_of(encoder), "fp16", kept)
    weights = [p for name in kept for p in changed.encoder.network.get_submodule(name).parameters()]
    with torch.inference_mode():
        expected = changed(images)
    program = trace_frozen(changed, encoder.inputs[0], (1,))
    lint_torchscript(program, ["b1"], "fp16", weights)
    for exact, got in zip(expected, program(images)):
        assert torch.equal(got, exact)
    graph, _ = export_graph(changed, encoder.inputs[0], encoder.outputs, 1, 18)
    lint_onnx(graph, "model.b1.onnx", "fp16", kept)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    for exact, given in zip(expected, session.run(None, {"pixel_values": images.numpy()})):
        assert np.abs(given - exact.numpy()).max() < 2e-2


def test_lint_finds_a_module_that_was_to_be_kept_and_was_not_and_one_that_was_not_to_be() -> None:
    encoder = tiny.TINY
    kept = in_precision(module_of(encoder), "fp16", ["blocks.1"])
    rounded = in_precision(module_of(encoder), "fp16")
    weights = list(kept.encoder.network.blocks[1].parameters())
    for module, wanted, names in ((kept, [], []), (rounded, weights, ["blocks.1"])):
        with pytest.raises(LintError, match="would not run") as raised:
            lint_torchscript(trace_frozen(module, encoder.inputs[0], (1,)), ["b1"], "fp16", wanted)
        assert "has a weight of torch.float" in str(raised.value.got)
        with pytest.raises(LintError, match="would not run"):
            lint_onnx(export_graph(module, encoder.inputs[0], encoder.outputs, 1, 18)[0], "model", "fp16", names)


def test_of_boundaries_in_each_other_the_outer_one_may_be_kept() -> None:
    block = nn.Module()
    block.blocks = nn.ModuleList([nn.Linear(2, 2)])
    network = nn.Module()
    network.blocks = nn.ModuleList([block, nn.Linear(2, 2), nn.Identity()])
    assert list(castable_modules(network)) == ["blocks.0", "blocks.1"]


def test_between_kept_modules_nothing_is_rounded() -> None:
    module = module_of(tiny.TINY_CONVNEXT)
    images = torch.randn(tiny.TINY_CONVNEXT.inputs[0].of_batch(1), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = module(images)
        (got,) = in_precision(module, "fp16", tiny.BOUNDARIES["tiny-convnext"])(images)
    assert torch.equal(got, expected[0])


def test_modules_that_cannot_be_kept_are_named_with_the_choices() -> None:
    with pytest.raises(UsageError, match="no such module") as raised:
        in_precision(module_of(tiny.TINY), "fp16", ["blocks.1", "blocks.7", "blocks"])
    assert raised.value.got == "blocks.7, blocks"
    assert raised.value.expected == "patch_embed, blocks.0, blocks.1, norm"


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16"])
def test_onnxruntime_runs_every_operator_in_what_onnx_exports_may_have(dtype: str) -> None:
    assert operators_without_kernel(dtype) == ()


def test_onnxruntime_lacks_operators_in_bfloat16_and_they_are_named() -> None:
    lacking = operators_without_kernel("BFLOAT16")
    assert set(lacking) < set(OPERATORS)
    if not lacking:
        pytest.skip("this onnxruntime runs bfloat16 on the CPU")
    with pytest.raises(UnavailableError) as raised:
        require_kernels("bf16")
    assert raised.value.got == f"none for {', '.join(lacking)}"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_precisions_that_can_be_checked_are_let_through(precision: Precision) -> None:
    assert require_kernels(precision) is None


@pytest.mark.parametrize("precision", HALVES)
def test_what_a_batch_norm_remembers_takes_the_type(precision: Precision) -> None:
    """torch refuses half precision beside running variances of float32."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.register_buffer("positions", torch.ones(1), persistent=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.norm(x),)

    changed = in_precision(Network().eval(), precision)
    dtypes = {name.removeprefix("encoder."): buffer.dtype for name, buffer in changed.named_buffers()}
    assert dtypes == {
        "norm.running_mean": torch_dtype(precision),
        "norm.running_var": torch_dtype(precision),
        "norm.num_batches_tracked": torch.int64,
        "positions": torch.float32,
    }
    with torch.inference_mode():
        assert changed(torch.ones(1, 3, 2, 2))[0].dtype == torch.float32
