from __future__ import annotations

import pytest
import tiny
import torch

from npu_export.encoders.spec import EncoderSpec
from npu_export.network import load_network, plan_weights
from npu_export.precision import OPERATORS, in_precision, operators_without_kernel, require_kernels, torch_dtype
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Precision
from npu_runtime.errors import UnavailableError

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
    limits = {
        (tolerance.output, tolerance.metric): tolerance.limit for tolerance in encoder.published.tolerances[precision]
    }
    for spec, exact, rounded in zip(encoder.outputs, expected, got):
        assert rounded.dtype == torch.float32
        assert 1e-5 < (rounded - exact).abs().max().item() <= limits[spec.name, "max_abs_error"]


def test_fp32_is_the_module_itself() -> None:
    module = module_of(tiny.TINY)
    assert in_precision(module, "fp32") is module


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
