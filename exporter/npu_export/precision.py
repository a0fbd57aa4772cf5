"""Networks whose weights and compute are float16 or bfloat16, wholly or but for some modules, between float32 images
and float32 outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from npu_export.boundaries import boundary_names
from npu_runtime.artifact.schema import Precision
from npu_runtime.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

OPERATORS = ("MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Add", "Mul", "Erf", "Sigmoid", "Tanh")
"""ONNX operators that the encoders compute with, among others that only move data."""


def torch_dtype(precision: Precision) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def in_precision(module: nn.Module, precision: Precision, keep_fp32: Sequence[str] = ()) -> nn.Module:
    """The module with weights and compute in a precision, from float32 to float32; its network is changed.

    All parameters take the type, those of norms and what batch norms remember too, as `model.to(dtype)` does in every
    upstream; torch computes the statistics of norms and the softmax of attention in float32 whatever the type of their
    inputs. Buffers that are computed and not stored, such as rotary positions, stay float32, as PE's own are.

    `keep_fp32` names modules of the network that keep float32, among `castable_modules`. Each module with weights
    casts what comes in to its own type and leaves what it gives as it is, so that from one that is kept to the next
    nothing is rounded. Raises UsageError for other names. In fp32 all modules are as kept ones.
    """
    if precision == "fp32":
        return module
    from npu_export.encoders.outputs import InPrecision

    network: Any = module.network if keep_fp32 else None
    modules = castable_modules(network) if keep_fp32 else {}
    check_kept(keep_fp32, modules)
    dtype, wide = torch_dtype(precision), torch_dtype("fp32")
    kept = {id(t) for name in keep_fp32 for t in (*modules[name].parameters(), *_stored_buffers(modules[name]))}
    for tensor in (*module.parameters(), *_stored_buffers(module)):
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(dtype)
    if not keep_fp32:
        return InPrecision(module, dtype)
    for name, part in modules.items():
        part.register_forward_pre_hook(_cast_input(wide if name in keep_fp32 else dtype))
    return InPrecision(module, wide)  # the first module casts the images, if it has another type


def _stored_buffers(module: nn.Module) -> list[torch.Tensor]:
    """Floating-point buffers that a checkpoint holds: running means and variances."""
    stored = module.state_dict(keep_vars=True)
    return [buffer for name, buffer in module.named_buffers() if name in stored and buffer.is_floating_point()]


def castable_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network that may have a type of their own, by name: those of its boundaries that have weights.

    What runs between them, such as an addition of positions, computes in the type of what comes before it. Of
    boundaries that stand in each other it is the outer one.
    """
    modules = dict(network.named_modules())
    names = [name for name in boundary_names(modules) if next(modules[name].parameters(), None) is not None]
    return {name: modules[name] for name in names if not name.startswith(tuple(f"{outer}." for outer in names))}


def check_kept(names: Iterable[str], choices: Iterable[str]) -> None:
    """Raise UsageError, all unknown names listed, unless each of the modules to keep is among the choices."""
    known = list(choices)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            "there is no such module to keep in float32",
            expected=", ".join(known),
            got=", ".join(unknown),
        )


def _cast_input(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that casts the first argument of a module, what flows through it; positions beside it stay as they are."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not inputs or not inputs[0].is_floating_point() or inputs[0].dtype == dtype:
            return inputs
        return (inputs[0].to(dtype), *inputs[1:])

    return hook


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
