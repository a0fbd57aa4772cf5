"""How exact a device's operators are, measured on the calls that a program makes, and what is refused for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from npu_runtime.devices.ambient import without_autocast
from npu_runtime.devices.device import Device
from npu_runtime.devices.failures import is_failure
from npu_runtime.errors import NumericsError

if TYPE_CHECKING:
    import torch

    from npu_runtime.artifact.schema import Numerics
    from npu_runtime.devices.observed import Call

KINDS = ("matmul", "conv", "attention", "softmax", "layer_norm", "rms_norm", "gelu")
"""The kinds of operator that are measured."""
EXACT = {"float32": 1e-5, "float16": 4 * 2.0**-10, "bfloat16": 4 * 2.0**-7}
"""The most that an exact operator is off, by the dtype of its operands. Of float32: those below are float32's, 1e-6
and less; TF32's and HF32's are 1e-4 and more, GELU's by tanh is 4.7e-4. Of the others four times the dtype's epsilon:
the result is rounded to it, and what attention keeps in between may be as well."""
WRONG = 1e-1
"""What is off by more is wrong under any numerics: the coarsest that a device offers, HF32 or bfloat16 products, are
off by 1e-2 and less, and attention that averages uniformly (vllm-project/vllm-ascend, issue 13699) by half and more."""
MOST_WORK = 2**29
"""Multiply-adds of a measured product, convolution or attention: rows, heads and images beyond it are left out."""
MOST_ELEMENTS = 2**21
"""Elements of the operand of any other."""
SHARPNESS = 3.0
"""Standard deviation of attention's scores: the softmax is then far from uniform, as a trained encoder's is."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Errors of a device's operators against float64 on the CPU, at shapes of the program's own; None for a kind that
    the program does not have or that could not be called alone. The fields are `KINDS`."""

    matmul: float | None
    """Relative L2 error of the largest product, of standard normals, as all of these."""
    conv: float | None
    """Relative L2 error of the largest convolution."""
    gelu: float | None
    """Largest error of the program's GELU, by erf or by tanh as it says, on [-4, 4]."""
    attention: float | None = None
    """Relative L2 error of the largest fused attention, without a mask."""
    softmax: float | None = None
    """Relative L2 error."""
    layer_norm: float | None = None
    """Relative L2 error."""
    rms_norm: float | None = None
    """Relative L2 error."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Kind -> dtype of its operands; float32 for a kind that is not named."""

    def errors(self) -> dict[str, float]:
        """The error of each kind that was measured."""
        found = {kind: getattr(self, kind) for kind in KINDS}
        return {kind: error for kind, error in found.items() if error is not None}

    def limit(self, kind: str) -> float:
        """The most that the error of a kind may be under strict numerics."""
        return EXACT[self.dtypes.get(kind, "float32")]

    def inexact(self) -> list[str]:
        """The kinds that are less exact than their dtype."""
        return [kind for kind, error in self.errors().items() if not error <= self.limit(kind)]


def measure_arithmetic(device: torch.device, calls: Mapping[str, Call]) -> Arithmetic:
    """Call each operator once on the device, on the same numbers everywhere.

    Raises the device's own failures (`is_failure`) as torch does.
    """
    import torch

    errors: dict[str, float | None] = dict.fromkeys(KINDS)
    dtypes = {}
    with torch.inference_mode(), without_autocast(device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, call in calls.items():
            operand = call.operand(*_CUT[kind])
            dtype = None if operand is None else str(operand.dtype).removeprefix("torch.")
            if dtype in EXACT:
                errors[kind] = _measure(kind, call, device)
                if dtype != "float32" and errors[kind] is not None:
                    dtypes[kind] = dtype
    return Arithmetic(**errors, dtypes=dtypes)


def require_exact(arithmetic: Arithmetic, operators: Iterable[str], device: Device, numerics: Numerics) -> None:
    """Raise NumericsError when an operator of the program is wrong, or inexact under strict numerics."""
    from npu_runtime.devices.observed import base_name, kind_of

    operators = sorted(operators)
    for kind, error in arithmetic.errors().items():
        where = ", ".join(o for o in operators if kind_of(base_name(o)) == kind) or kind
        got = f"{error:.1e}, measured on the device at the program's own shapes"
        if not error <= WRONG:
            raise NumericsError(
                f"{kind} gives wrong results on {device}",
                operator=kind,
                where=where,
                expected=f"an error below {WRONG:.0e} under any numerics",
                got=got,
                hint="another version of torch-npu or CANN may have it right; --device cpu runs the encoder meanwhile",
            )
        if numerics == "strict" and not error <= arithmetic.limit(kind):
            dtype = arithmetic.dtypes.get(kind, "float32")
            raise NumericsError(
                f"{kind} is not exact {dtype} on {device}, and strict numerics ask for it",
                operator=kind,
                where=where,
                expected=f"an error below {arithmetic.limit(kind):.0e}",
                got=got,
                hint="load the encoder before anything else runs on the device, set TORCH_NPU_USE_COMPATIBLE_IMPL=1 "
                "in the environment, or take fast numerics"
                if kind == "gelu"
                else "something else in the process or environment forces lower precision; or take fast numerics",
            )


_CUT = {
    "matmul": ("mat1", "batch1", "input", "self"),
    "conv": ("input", "self"),
    "attention": ("query",),
    "softmax": ("self", "input"),
    "layer_norm": ("input", "self"),
    "rms_norm": ("input", "self"),
    "gelu": ("self", "input"),
}
"""Kind -> names, the first that there is, of the operand whose leading dimensions may be cut."""


def _measure(kind: str, call: Call, device: torch.device) -> float | None:
    """The error of an operator; None where it cannot be called alone."""
    import torch

    from npu_runtime.devices.observed import Operand

    arguments = _cut(kind, call)
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(name: str, operand: Operand) -> torch.Tensor:
        if kind == "gelu":
            line = torch.linspace(-4, 4, math.prod(operand.shape), dtype=torch.float32, device="cpu")
            return line.reshape(operand.shape).to(operand.dtype)
        values = torch.randn(operand.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (values * SHARPNESS if name == "query" else values).to(operand.dtype)

    tensors = {name: drawn(name, value) for name, value in arguments.items() if isinstance(value, Operand)}
    expected = _reference(kind, call, {**arguments, **{name: tensor.double() for name, tensor in tensors.items()}})
    if expected is None:
        return None
    try:
        result = call.operator(**{**arguments, **{name: tensor.to(device) for name, tensor in tensors.items()}})
    except RuntimeError as error:
        if is_failure(error):
            raise
        return None
    got = (result[0] if isinstance(result, (tuple, list)) else result).cpu().double()
    if kind == "gelu":
        return float((got - expected).abs().max())
    return float((got - expected).norm() / expected.norm())


def _reference(kind: str, call: Call, arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """What the operator gives in float64 on the CPU; None where that is not known."""
    import torch

    if kind == "attention":
        if "query" not in arguments or arguments.get("input_layout", "BNSD") != "BNSD" or arguments["query"].dim() != 4:
            return None
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        scale = arguments.get("scale")
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        attended: torch.Tensor = torch.softmax(scores, dim=-1) @ value
        return attended
    if kind == "rms_norm":
        x = arguments.get("input", arguments.get("self"))
        eps = arguments.get("epsilon", arguments.get("eps"))
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        weight = arguments.get("weight", arguments.get("gamma"))
        if x is None or weight is None or weight.dim() != 1:
            return None
        normalised: torch.Tensor = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight
        return normalised
    if call.operator.namespace != "aten":
        return None
    same = {name: value for name, value in arguments.items() if name != "half_to_float"}
    if "half_to_float" in arguments:
        same["half_to_float"] = False
    result = call.operator(**same)
    first: torch.Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return first


def _cut(kind: str, call: Call) -> dict[str, object]:
    """The call's arguments with fewer rows, heads or images where it is large, and attention without a mask."""
    from npu_runtime.devices.observed import Operand

    arguments = dict(call.arguments)
    main = call.operand(*_CUT[kind])
    if main is None:
        return arguments
    products = kind in ("matmul", "conv", "attention")
    share = min(1.0, (MOST_WORK if products else MOST_ELEMENTS) / max(1, call.work))
    last = {"conv": len(main.shape) - 1, "attention": 2, "gelu": 0}.get(kind, 1)
    if call.name in ("bmm", "baddbmm"):
        last = 2
    shape = arguments.get("normalized_shape")
    if isinstance(shape, (list, tuple)):
        last = len(shape)
    if kind == "softmax" and arguments.get("dim") not in (-1, len(main.shape) - 1):
        return arguments
    leading = main.shape[: len(main.shape) - last]
    kept = _cut_shape(leading, share)
    for name, value in arguments.items():
        if isinstance(value, Operand) and leading and value.shape[: len(leading)] == leading and name != "weight":
            arguments[name] = replace(value, shape=(*kept, *value.shape[len(leading) :]))
    if kind == "attention":
        for name, value in arguments.items():
            if isinstance(value, Operand) and name not in ("query", "key", "value"):
                arguments[name] = None
        arguments.update({name: kept[1] for name in ("head_num",) if name in arguments and len(kept) == 2})
        arguments.update({name: False for name in ("is_causal",) if name in arguments})
    return arguments


def _cut_shape(shape: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Dimensions of which about a share is left, the first cut first."""
    kept = []
    for size in shape:
        kept.append(max(1, int(size * share)))
        share = min(1.0, share * size / kept[-1])
    return tuple(kept)
