"""The eager network in other arithmetic than its own: wider, narrower as devices do it, or with their shortcuts.

Each is a mode of torch that is entered while the network runs. The network and its weights stay as they are, and an
operand is converted when an operator takes it, so that no second copy of the weights is held.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from npu_runtime.devices.ambient import without_autocast
from npu_runtime.torch_interop import array_from_tensor, tensor_from_array

if TYPE_CHECKING:
    from torch import nn

    from npu_runtime.artifact.store import Images
    from npu_runtime.backends.base import Array

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution"})
"""aten's products; what else multiplies is made of them or is attention."""
ATTENTION = "scaled_dot_product"
"""How aten's fused attentions begin, with an underscore or without."""
_HALVES = (torch.float16, torch.bfloat16)
_NARROWER = {torch.float64: (torch.float32, *_HALVES), torch.float32: _HALVES}
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
TF32_MANTISSA_BITS = 10
"""Of NVIDIA's TF32. Ascend's HF32 keeps 11, so that what TF32 does bounds it (CANN's document of allow_hf32)."""


class Widened(TorchFunctionMode):
    """Every operator in a wider type: narrower operands are converted, and so is what asks for a narrower type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._narrower = _NARROWER[dtype]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            return args[0].to(self._dtype)
        args, kwargs = tree_map(self._widen, args), tree_map(self._widen, kwargs or {})
        if func is torch.nn.functional.conv2d and self._dtype == torch.float64 and not kwargs:
            return _depthwise(*args) if _is_depthwise(*args) else func(*args)
        return func(*args, **kwargs)

    def _widen(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self._dtype) if value.dtype in self._narrower else value
        return self._dtype if isinstance(value, torch.dtype) and value in self._narrower else value


def _is_depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether a convolution has a kernel for each channel, moves by one pixel, and is padded by numbers."""
    ones = all(
        n == 1 for given in (stride, dilation) for n in (given if isinstance(given, (tuple, list)) else (given,))
    )
    return ones and groups == x.shape[1] == weight.shape[0] and not isinstance(padding, str)


def _depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *_: Any
) -> Any:
    """Such a convolution as a sum of shifted products: torch's own in float64 takes ten times as long."""
    rows, columns = padding if isinstance(padding, (tuple, list)) else (padding, padding)
    height, width = weight.shape[2:]
    padded = torch.nn.functional.pad(x, (columns, columns, rows, rows))
    down, across = padded.shape[2] - height + 1, padded.shape[3] - width + 1
    total = x.new_zeros(*x.shape[:2], down, across)
    for i in range(height):
        for j in range(width):
            total.addcmul_(padded[:, :, i : i + down, j : j + across], weight[:, 0, i, j, None, None])
    return total if bias is None else total + bias[:, None, None]


class SummedInFloat32(TorchDispatchMode):
    """Products and attention of a half precision summed in float32 and rounded once, as matrix units do it.

    A model of that precision for a processor without it: torch's own kernels there take forty times as long for the
    same result, but for the order of sums. All other operators run as torch runs them.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not (name in PRODUCTS or ATTENTION in name):
            return func(*args, **kwargs)
        narrow = [v for v in args if isinstance(v, torch.Tensor) and v.dtype == self._dtype]
        result = func(*tree_map(self._widen, args), **tree_map(self._widen, kwargs))
        return tree_map(self._round, result) if narrow else result

    def _widen(self, value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype == self._dtype else value

    def _round(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


class FastNumerics(TorchDispatchMode):
    """float32 as devices shorten it when they may: operands of products with TF32's mantissa, and GELU by tanh."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name in PRODUCTS or ATTENTION in name:
            # What is added to a product is not multiplied: the first operand of these, and a convolution's bias.
            unchanged = 0 if name in ("addmm", "baddbmm", "addmv") else 2 if name == "convolution" else None
            args = tuple(v if place == unchanged else tree_map(_to_tf32, v) for place, v in enumerate(args))
        elif name == "gelu":
            kwargs["approximate"] = "tanh"
        return func(*args, **kwargs)


def _to_tf32(value: Any) -> Any:
    """The nearest numbers with TF32's mantissa, ties to even."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    dropped = 23 - TF32_MANTISSA_BITS
    bits = value.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return ((bits + half) & -(1 << dropped)).view(torch.float32)


def run_in(module: nn.Module, pixel_values: Images, mode: Callable[[], AbstractContextManager[Any]]) -> list[Array]:
    """All outputs of a module on the CPU, image by image, run in an arithmetic; those of float64 as float64."""
    rows = []
    with torch.no_grad(), without_autocast("cpu"):  # views of weights made in inference mode refuse a dispatch mode
        for image in pixel_values:
            with mode():
                rows.append(module(tensor_from_array(image[None])))
    return [array_from_tensor(torch.cat(parts)) for parts in zip(*rows)]
