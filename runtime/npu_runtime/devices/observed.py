"""The largest call of each measured kind of operator that a program makes: shapes and numbers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of a call."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Call:
    """An operator as a program calls it, with `Operand` in the place of tensors."""

    operator: Any
    arguments: Mapping[str, object]
    """By the names in the operator's schema."""
    work: int
    """Multiply-adds of products, convolutions and attention; elements of the result of anything else."""

    @property
    def name(self) -> str:
        """Such as `addmm`."""
        return base_name(str(self.operator.name()))

    def operand(self, *names: str) -> Operand | None:
        """The tensor of the first of these names that there is."""
        found = (self.arguments.get(name) for name in names)
        return next((value for value in found if isinstance(value, Operand)), None)


PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
"""What torch makes of every product of matrices before a device sees it."""


def base_name(name: str) -> str:
    """`addmm` of `aten::addmm.out`."""
    return name.partition("::")[2].partition(".")[0]


def kind_of(name: str) -> str | None:
    """The measured kind of an operator by its name without namespace and overload; None where it is of none."""
    if name in PRODUCTS or name in ("linear", "matmul"):
        return "matmul"
    if name in ("softmax", "_softmax", "_safe_softmax"):
        return "softmax"
    return next((kind for kind in ("attention", "layer_norm", "rms_norm", "conv", "gelu") if kind in name), None)


class Observer:
    """Keeps the largest call of each kind."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self._before = ""
        self._squares: Operand | None = None

    def see(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note a call that was made. Operators that write into their arguments are not measured."""
        name = base_name(operator.name())
        kind = "rms_norm" if name == "rsqrt" else kind_of(name)
        if kind is not None or name == "mean":
            names = [argument.name for argument in operator._schema.arguments]
            arguments = {key: _without_memory(value) for key, value in [*zip(names, args), *kwargs.items()]}
            call = Call(operator, arguments, _work(arguments, result))
            if name == "mean":
                self._squares = call.operand("self") if self._before in ("pow", "square", "mul") else None
            elif name == "rsqrt":
                self._see_decomposed_rms_norm(call)
            elif kind is not None and not operator._schema.is_mutable:
                self._keep(kind, call)
        self._before = name

    def _see_decomposed_rms_norm(self, call: Call) -> None:
        """torch takes RMSNorm apart, into the root of the mean of squares among others, where a device has none."""
        root, squares = call.operand("self"), self._squares
        if root is not None and squares is not None and root.shape == (*squares.shape[:-1], 1):
            width = squares.shape[-1:]
            arguments = {"input": squares, "normalized_shape": list(width), "weight": Operand(width, squares.dtype)}
            self._keep("rms_norm", Call(torch.ops.aten.rms_norm.default, arguments, math.prod(squares.shape)))

    def _keep(self, kind: str, call: Call) -> None:
        if kind not in self.calls or call.work > self.calls[kind].work:
            self.calls[kind] = call


def _without_memory(value: Any) -> object:
    return Operand(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def _work(arguments: Mapping[str, object], result: Any) -> int:
    tensor = result[0] if isinstance(result, (tuple, list)) else result
    size = tensor.numel() if isinstance(tensor, torch.Tensor) else 0
    by_name = {name: value.shape for name, value in arguments.items() if isinstance(value, Operand)}
    if "mat2" in by_name:
        return int(size * by_name["mat2"][-2])
    if "batch2" in by_name:
        return int(size * by_name["batch2"][-2])
    if "key" in by_name:
        return int(size * by_name["key"][-2])
    if "weight" in by_name and len(by_name["weight"]) > 1:
        return int(size * math.prod(by_name["weight"][1:]))
    return int(size)
