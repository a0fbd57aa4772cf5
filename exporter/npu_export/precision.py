"""Networks whose weights and compute are float16 or bfloat16, with float32 inputs and outputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from npu_runtime.artifact.schema import Precision
from npu_runtime.errors import UnavailableError

if TYPE_CHECKING:
    import torch
    from torch import nn

OPERATORS = ("MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Add", "Mul", "Erf", "Sigmoid", "Tanh")
"""ONNX operators that the encoders compute with, among others that only move data."""


def torch_dtype(precision: Precision) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def in_precision(module: nn.Module, precision: Precision) -> nn.Module:
    """The module with weights and compute in a precision, from float32 to float32; its weights are changed.

    All parameters take the type, those of norms too, as `model.to(dtype)` does in every upstream; torch
    computes the statistics of norms and the softmax of attention in float32 whatever the type of their
    inputs. Buffers that are computed, such as rotary positions, stay float32, as PE's own are.
    """
    if precision == "fp32":
        return module
    from npu_export.encoders.outputs import InPrecision

    dtype = torch_dtype(precision)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return InPrecision(module, dtype)


def require_kernels(precision: Precision) -> None:
    """Raise UnavailableError where ONNX Runtime's CPU cannot run the precision, so nothing could be checked."""
    if precision == "bf16" and (lacking := operators_without_kernel("BFLOAT16")):
        raise UnavailableError(
            "an ONNX export in bf16 could not be checked here",
            expected="ONNX Runtime kernels for bfloat16 on the CPU",
            got=f"none for {', '.join(lacking)}",
            hint="choose --format torchscript for bf16, or --precision fp16 or fp32 for onnx",
        )


@functools.cache
def operators_without_kernel(dtype: str) -> Sequence[str]:
    """Those of `OPERATORS` that the installed ONNX Runtime does not run on the CPU in an ONNX dtype.

    A graph of one node each is opened: what runs is not documented by release.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    kind = getattr(TensorProto, dtype)
    inputs = {"Conv": ((1, 1, 2, 2), (1, 1, 1, 1)), "LayerNormalization": ((2, 2), (2,))}
    two = ("MatMul", "Gemm", "Add", "Mul")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    lacking = []
    for operator in OPERATORS:
        shapes = inputs.get(operator, ((2, 2), (2, 2)) if operator in two else ((2, 2),))
        names = [f"x{index}" for index in range(len(shapes))]
        graph = helper.make_graph(
            [helper.make_node(operator, names, ["y"])],
            "one_node",
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in zip(names, shapes)],
            [helper.make_tensor_value_info("y", kind, shapes[0])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # onnxruntime's own classes share no public base but Exception
            lacking.append(operator)
    return tuple(lacking)
