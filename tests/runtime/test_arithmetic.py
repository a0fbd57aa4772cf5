"""Operators measured against float64 on the shapes of a program, here on the CPU, which is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from npu_runtime import ProgramError
from npu_runtime.devices import Device
from npu_runtime.devices.arithmetic import MOST_WORK, Arithmetic, measure_arithmetic, require_exact
from npu_runtime.devices.observed import Call, Observer, Operand

DEVICE = Device("npu", 0)
CPU = torch.device("cpu")


def calls_of(program: Callable[[], object]) -> Mapping[str, Call]:
    """The largest calls that a program makes."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            observer.see(func, args, kwargs or {}, result)
            return result

    observer = Observer()
    with torch.no_grad(), Watch():
        program()
    return observer.calls


def encoder(dtype: torch.dtype = torch.float32, **attention: object) -> Callable[[], object]:
    """One of each measured kind of operator, products of two sizes."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def run() -> None:
        functional.conv2d(normal(2, 6, 16, 16), normal(8, 3, 4, 4), normal(8), stride=4, groups=2)
        functional.linear(normal(2, 17, 32), normal(8, 32), normal(8))
        functional.linear(normal(2, 17, 32), normal(96, 32), normal(96))
        functional.scaled_dot_product_attention(*(normal(2, 4, 17, 8) for _ in range(3)), **attention)  # type: ignore[arg-type]
        torch.softmax(normal(2, 4, 17, 17), dim=-1)
        functional.layer_norm(normal(2, 17, 32), (32,), normal(32), normal(32), 1e-6)
        functional.rms_norm(normal(2, 17, 32), (32,), normal(32), 1e-5)
        functional.gelu(normal(2, 17, 96))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_cpus_operators_are_exact_at_the_shapes_of_a_program(dtype: torch.dtype) -> None:
    calls = calls_of(encoder(dtype))
    assert calls["matmul"].operand("mat1", "input") == Operand((34, 32), dtype)
    assert calls["matmul"].work == 34 * 32 * 96
    assert calls["conv"].work == 2 * 8 * 4 * 4 * (3 * 4 * 4)
    assert calls["rms_norm"].arguments["normalized_shape"] == [32]
    arithmetic = measure_arithmetic(CPU, calls)
    assert set(arithmetic.errors()) == {"matmul", "conv", "attention", "softmax", "layer_norm", "rms_norm", "gelu"}
    assert arithmetic.inexact() == []
    name = str(dtype).removeprefix("torch.")
    assert set(arithmetic.dtypes.values()) == (set() if name == "float32" else {name})
    if dtype is torch.float32:
        assert all(0 < error < 2e-6 for error in arithmetic.errors().values()), arithmetic


def test_what_a_program_does_not_have_is_not_measured() -> None:
    calls = calls_of(lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 4)).add_(1).relu())
    assert measure_arithmetic(CPU, calls) == Arithmetic(pytest.approx(0, abs=1e-6), None, None)
    assert measure_arithmetic(CPU, calls_of(lambda: torch.ones(3))).errors() == {}


def test_a_large_call_is_cut_in_its_rows_heads_and_images_and_nowhere_else() -> None:
    shape = (2, 16, 2048, 64)
    calls = {"attention": calls_of(encoder())["attention"]}
    query = Operand(shape, torch.float32)
    arguments = {**calls["attention"].arguments, "query": query, "key": query, "value": query}
    from npu_runtime.devices.arithmetic import _cut

    cut = _cut("attention", Call(calls["attention"].operator, arguments, math.prod(shape) * 2048))
    assert isinstance(cut["query"], Operand)
    batch, heads, tokens, width = cut["query"].shape
    assert (batch, tokens, width) == (1, 2048, 64)
    assert 1 <= heads * tokens * tokens * width // MOST_WORK <= 1
    assert cut["key"] == cut["value"] == cut["query"]


@pytest.mark.parametrize(
    ("kind", "operator"),
    [
        ("matmul", "aten::addmm"),
        ("conv", "aten::_convolution"),
        ("attention", "npu::npu_fusion_attention_v3"),
        ("layer_norm", "aten::native_layer_norm"),
        ("gelu", "aten::gelu"),
    ],
)
def test_an_operator_that_is_not_exact_is_refused_by_name_under_strict_numerics(kind: str, operator: str) -> None:
    exact = dict.fromkeys(("matmul", "conv", "gelu"), 1e-7)
    inexact = Arithmetic(**{**exact, kind: 4e-4})  # type: ignore[arg-type]
    assert inexact.inexact() == [kind]
    with pytest.raises(ProgramError, match=f"{kind} is not exact float32 on npu:0") as caught:
        require_exact(inexact, {"aten::add", operator}, DEVICE, "strict")
    assert caught.value.where == operator
    assert caught.value.got is not None
    assert caught.value.got.startswith("4.0e-04, measured")
    require_exact(inexact, {"aten::add", operator}, DEVICE, "fast")


@pytest.mark.parametrize("error", [0.2, math.nan])
def test_an_operator_that_is_wrong_is_refused_under_any_numerics(error: float) -> None:
    wrong = Arithmetic(1e-7, None, None, attention=error)
    with pytest.raises(ProgramError, match="attention gives wrong results on npu:0"):
        require_exact(wrong, {"npu::npu_fusion_attention_v3"}, DEVICE, "fast")


def test_half_precision_is_held_to_its_own_epsilon() -> None:
    half = Arithmetic(1e-3, None, None, dtypes={"matmul": "float16"})
    assert half.inexact() == []
    assert Arithmetic(5e-3, None, None, dtypes={"matmul": "float16"}).inexact() == ["matmul"]
    assert Arithmetic(5e-3, None, None, dtypes={"matmul": "bfloat16"}).inexact() == []


def replaced(call: Call, operator: Callable[..., torch.Tensor]) -> Call:
    """A device on which this call runs as `operator` does; float64, the reference, is right everywhere."""

    class Broken:
        namespace = "aten"

        def name(self) -> str:
            return str(call.operator.name())

        def __call__(self, /, **arguments: Any) -> torch.Tensor:
            tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
            if tensors[0].dtype is torch.float64:
                right: torch.Tensor = call.operator(**arguments)
                return right
            return operator(*tensors)

    return Call(Broken(), call.arguments, call.work)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """As HF32 and TF32 do, 10 bits behind the leading one."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_uniform_attention_a_tanh_gelu_and_rounded_products_are_measured_as_such() -> None:
    calls = calls_of(encoder())
    broken = {
        "attention": replaced(calls["attention"], lambda q, k, v: v.mean(-2, keepdim=True).expand_as(v)),
        "gelu": replaced(calls["gelu"], lambda x: functional.gelu(x, approximate="tanh")),
        "matmul": replaced(calls["matmul"], lambda b, x, y: torch.addmm(b, rounded(x), rounded(y))),
    }
    arithmetic = measure_arithmetic(CPU, broken)
    assert sorted(arithmetic.inexact()) == ["attention", "gelu", "matmul"]
    assert arithmetic.attention is not None
    assert arithmetic.attention > 0.5
    assert arithmetic.gelu == pytest.approx(4.7e-4, rel=0.02)
    assert 1e-4 < (arithmetic.matmul or 0) < 1e-3
