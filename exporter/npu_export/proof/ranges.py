"""How large and how small the values of a network are, module by module, where float16 programs hold them.

The float32 network runs under a dispatch mode, which sees each operator of torch with its output. Which operators
give float16 is not guessed: the network first runs without numbers (FakeTensorMode) as it would be with float16
weights, and its operators are the same in the same order. So a norm that a network itself spells in float32, or that
torch does, is not held against float16's limits.

What fused operators compute inside is added from the table `INSIDE`, with what ONNX graphs do of it in float16: torch's
exporter spells GELU, the scores of attention and the product of a linear layer with bias out in the type of their
inputs. The kernels of torch hold all of it in float32, and so do LayerNormalization (stash_type 1) and the softmax of
attention in the graphs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from npu_export.encoders.outputs import InPrecision
from npu_export.precision import castable_modules
from npu_runtime.artifact.schema import Extreme, ModuleRange, TensorSpec
from npu_runtime.artifact.store import Images
from npu_runtime.devices.ambient import without_autocast
from npu_runtime.torch_interop import tensor_from_array

LARGEST = 65504.0
"""The largest number of float16."""
CAST = "aten::_to_copy"
MOVES = ("aten::clone", "aten::cat", "aten::stack", "aten::_unsafe_view", CAST)
"""Operators that give the values that they are given."""
NAMES = {
    "aten::addmm": "linear",
    "aten::mm": "linear",
    "aten::bmm": "matmul",
    "aten::convolution": "conv",
    "aten::native_layer_norm": "layer_norm",
}
"""Operators as people know them; the others bear torch's names."""
DIVIDED_BY_SIZE = ("aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rsqrt", "aten::linalg_vector_norm")
"""Operators that make small inputs large again, and what was rounded off them with it."""
ATTENTION = "aten::_scaled_dot_product"
"""How the names of torch's fused attention begin."""
OPSET_OF_GELU = 20
"""The first ai.onnx opset that has GELU as one operator."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """Which programs are asked for: what they spell out in float16 depends on it."""

    onnx: bool
    opset: int


@dataclass(slots=True)
class _Found:
    """The extremes of a module so far."""

    largest: Extreme = field(default_factory=lambda: Extreme(0.0, "nothing"))
    smallest: Extreme | None = None
    inside: Extreme | None = None

    def take(self, value: float, operator: str, narrow: bool) -> None:
        if narrow and value > self.largest.value:
            self.largest = Extreme(value, operator)
        if not narrow and (self.inside is None or value > self.inside.value):
            self.inside = Extreme(value, operator)

    def take_size(self, tensor: torch.Tensor, operator: str) -> None:
        count = int(torch.count_nonzero(tensor))
        if count:
            size = float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) / math.sqrt(count)
            if math.isfinite(size) and (self.smallest is None or size < self.smallest.value):
                self.smallest = Extreme(size, operator)


class _ByModule(TorchDispatchMode):
    """Sees every operator with the module that it is counted to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = ""

    def enter(self, name: str, x: object) -> None:
        self.module = name

    def leave(self, name: str, output: object) -> None:
        pass


class _Types(_ByModule):
    """The operators of each module that give floating-point numbers, with their types, and how many casts there are."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, list[tuple[str, torch.dtype]]] = {}
        self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        output = _first(result)
        name = func._schema.name
        if output is not None and name == CAST:
            self.casts += args[0].is_floating_point() and args[0].dtype != output.dtype
        elif output is not None:
            self.operators.setdefault(self.module, []).append((name, output.dtype))
        return result


class _Values(_ByModule):
    """The extremes of each module, in the order in which they run."""

    def __init__(self, operators: Mapping[str, Sequence[tuple[str, torch.dtype]]], spelling: Spelling) -> None:
        super().__init__()
        self.found: dict[str, _Found] = {}
        self._operators = operators
        self._spelling = spelling
        self._seen: dict[str, int] = {}
        self._measures = False

    def enter(self, name: str, x: object) -> None:
        self.module = name
        self._take_flow(x, "input")

    def leave(self, name: str, output: object) -> None:
        self._take_flow(output, "output")

    def next_image(self) -> None:
        self.module = ""
        self._seen.clear()

    def of(self, module: str) -> _Found:
        return self.found.setdefault(module, _Found())

    def _take_flow(self, x: object, operator: str) -> None:
        if isinstance(x, torch.Tensor):
            self._measures = True  # hooks run under the mode, so it sees what is done here too
            self.of(self.module).take(_largest(x), operator, narrow=True)
            self.of(self.module).take_size(x, operator)
            self._measures = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        output = _first(result)
        name = func._schema.name
        if output is None or name == CAST or self._measures:
            return result
        narrow = self._gives_float16(name)
        if not (_is_view(func) or name in MOVES or not any(isinstance(value, torch.Tensor) for value in args)):
            found = self.of(self.module)
            found.take(_largest(output), _spell(name), narrow)
            for value, inside, spelled_out in _look_inside(name, args, kwargs or {}, output, self._spelling):
                found.take(value, inside, narrow and spelled_out)
            if narrow and name in DIVIDED_BY_SIZE:
                found.take_size(args[0], f"what {_spell(name)} is given")
        return result

    def _gives_float16(self, name: str) -> bool:
        """Whether the operator that just ran gives float16 in the float16 network; where that is not known, it does."""
        index = self._seen.get(self.module, 0)
        self._seen[self.module] = index + 1
        operators = self._operators.get(self.module, ())
        if index >= len(operators) or operators[index][0] != name:
            return True
        return operators[index][1] == torch.float16


def measure_modules(
    module: nn.Module, spec: TensorSpec, images: Iterable[Images], spelling: Spelling
) -> tuple[ModuleRange, ...]:
    """The ranges of each module of `module.network` that has weights, over images [3, H, W] that were normalised.

    The module is float32 and stays as it is.
    """
    network: Any = module.network
    types = _run_without_numbers(InPrecision(module, torch.float16), spec, torch.float16)
    values = _Values(types.operators, spelling)
    with torch.no_grad(), without_autocast("cpu"), _watched(network, values):
        for image in images:
            values.next_image()
            with values:
                module(tensor_from_array(image[None]))
    modules = castable_modules(network)
    owner = {
        id(parameter): (name, leaf) for name, part in modules.items() for leaf, parameter in part.named_parameters()
    }
    for path, parameter in network.named_parameters():
        name, leaf = owner.get(id(parameter), ("", path))
        values.of(name).take(_largest(parameter), f"parameter {leaf}", narrow=True)
        if name and parameter.ndim > 1:  # what stands outside is added to others, whose size counts
            values.of(name).take_size(parameter, f"parameter {leaf}")
    return tuple(
        ModuleRange(name, found.largest, LARGEST / found.largest.value, found.smallest, found.inside)
        for name, found in values.found.items()
        if found.largest.value > 0
    )


def count_casts(module: nn.Module, spec: TensorSpec, dtype: torch.dtype | None = None) -> int:
    """Conversions between floating-point types in a call of what `in_precision` made, without running it.

    With a dtype, those of what it would make of a float32 module if all its weights took that type.
    """
    return _run_without_numbers(module if dtype is None else InPrecision(module, dtype), spec, dtype).casts


def _run_without_numbers(module: nn.Module, spec: TensorSpec, dtype: torch.dtype | None) -> _Types:
    """What a call does with the parameters in a type, or in their own where it is None."""
    encoder: Any = module
    network = encoder.encoder.network
    types = _Types()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), without_autocast("cpu"):
        state: dict[str, torch.Tensor] = {}
        for name, parameter in module.named_parameters():
            tensor = fake.from_tensor(parameter)
            state[name] = tensor if dtype is None else tensor.to(dtype)
        state.update({name: fake.from_tensor(buffer) for name, buffer in module.named_buffers()})
        pixel_values = torch.empty(spec.of_batch(1))
        with _watched(network, types), types:
            torch.func.functional_call(module, state, (pixel_values,))
    return types


@contextlib.contextmanager
def _watched(network: nn.Module, mode: _ByModule) -> Iterator[None]:
    """While this is entered, `mode` is told when modules with weights begin and end."""

    def begins(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: mode.enter(name, inputs[0] if inputs else None)

    def ends(name: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        return lambda _, inputs, output: mode.leave(name, output)

    handles = []
    for name, module in castable_modules(network).items():
        # First of all: whatever other hooks do belongs to the module.
        handles.append(module.register_forward_pre_hook(begins(name), prepend=True))
        handles.append(module.register_forward_hook(ends(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _look_inside(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Tensor, spelling: Spelling
) -> Iterator[tuple[float, str, bool]]:
    """The largest |x| of what an operator computes inside, its name, and whether a program spells it out in float16."""
    if name.startswith(ATTENTION):
        scores, scale = _largest_score(args[0], args[1]), kwargs.get("scale") or 1 / math.sqrt(args[0].shape[-1])
        yield scores * scale, "scores of attention", spelling.onnx
        yield scores, "scores of attention before they are scaled", False
    elif name in INSIDE:
        yield from INSIDE[name](args, kwargs, output, spelling)


def _inside_norm(
    args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Tensor, spelling: Spelling
) -> Iterator[tuple[float, str, bool]]:
    x, dims = args[0], tuple(range(-len(args[1]), 0))
    yield _largest(x - x.mean(dims, keepdim=True)) ** 2, "square of what is left of the mean", False


def _inside_linear(
    args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Tensor, spelling: Spelling
) -> Iterator[tuple[float, str, bool]]:
    yield _largest(output - args[0]), "linear before its bias", spelling.onnx


def _inside_gelu(
    args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Tensor, spelling: Spelling
) -> Iterator[tuple[float, str, bool]]:
    if kwargs.get("approximate", "none") == "none":
        yield 2 * _largest(output), "x (1 + erf) of gelu", spelling.onnx and spelling.opset < OPSET_OF_GELU
    else:  # Pow(x, 3) in the graph; where it overflows, tanh of it is 1 or -1, as without
        yield _largest(args[0]) ** 3, "cube of gelu", False


INSIDE: Mapping[str, Callable[..., Iterator[tuple[float, str, bool]]]] = {
    "aten::native_layer_norm": _inside_norm,
    "aten::addmm": _inside_linear,
    "aten::gelu": _inside_gelu,
}
"""What fused operators compute inside, beside attention."""


def _largest_score(queries: torch.Tensor, keys: torch.Tensor) -> float:
    """The largest |q k| of any head, one head at a time: the scores of all may be larger than the network."""
    pairs = zip(queries.flatten(0, -3), keys.flatten(0, -3))
    return max(_largest(head @ other.transpose(-2, -1)) for head, other in pairs)


def _largest(tensor: torch.Tensor) -> float:
    """The largest |x|; infinities, and the largest number of the type that masks have for one, are left out."""
    if not tensor.numel():
        return 0.0
    low, high = (float(value) for value in torch.aminmax(tensor))
    largest = max(-low, high)
    bound = torch.finfo(tensor.dtype).max
    if largest < bound:
        return largest
    finite = tensor[tensor.abs() < bound]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _first(result: Any) -> torch.Tensor | None:
    """The first output, if it is a tensor of floating-point numbers; the others are statistics."""
    output = result[0] if isinstance(result, (tuple, list)) and result else result
    return output if isinstance(output, torch.Tensor) and output.is_floating_point() else None


def _is_view(func: Any) -> bool:
    """Whether what an operator returns is a part of what it is given, as it was."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _spell(name: str) -> str:
    return "attention" if name.startswith(ATTENTION) else NAMES.get(name, name.removeprefix("aten::").rstrip("_"))
