"""What rounding does to the outputs of a network, measured on the network itself at export."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from npu_export.precision import torch_dtype
from npu_export.proof.arithmetic import FastNumerics, SummedInFloat32, Widened, run_in
from npu_export.proof.limits import (
    FLOAT64_IMAGES,
    TF32_ROUNDOFF,
    UNIT_ROUNDOFF,
    Rounding,
    measure_rounding,
    tolerances,
)

if TYPE_CHECKING:
    from torch import nn

    from npu_export.reference import Recorded
    from npu_runtime.artifact.schema import Precision, TensorSpec, Tolerance
    from npu_runtime.artifact.store import Images
    from npu_runtime.parity.measure import Outputs

IN_FLOAT64 = functools.partial(Widened, torch.float64)
IN_FLOAT32 = functools.partial(Widened, torch.float32)


class RoundingStudy:
    """The eager network's outputs in float64, and in what else is compared with them."""

    def __init__(self, recorded: Recorded, specs: Sequence[TensorSpec]) -> None:
        self._recorded = recorded
        self._specs = specs
        self._images = recorded.pixel_values[:FLOAT64_IMAGES]
        self._exact: Outputs = {}
        self.float32: Rounding
        """Of eager float32; there once `run_float64` ran."""
        self._fast: Rounding | None = None
        self.narrow: Rounding | None = None
        """Of the half precision that was run."""

    def run_float64(self, module: nn.Module) -> None:
        """Run the float32 network in float64."""
        self._exact = self._run(module, self._images, IN_FLOAT64)
        count = len(self._images)
        eager = {name: values[:FLOAT64_IMAGES] for name, values in self._recorded.outputs.items()}
        self.float32 = self._measure(
            eager, self._exact, UNIT_ROUNDOFF["fp32"], f"eager float32 from float64, on {count} images"
        )

    def run_fast(self, module: nn.Module) -> None:
        """Run the float32 network as devices shorten it."""
        fast = self._run(module, self._images[:1], FastNumerics)
        how = "products of TF32 operands and GELU by tanh, from float64, on an image"
        self._fast = self._measure(fast, {n: values[:1] for n, values in self._exact.items()}, TF32_ROUNDOFF, how)

    def run_narrow(self, module: nn.Module, precision: Precision) -> Rounding:
        """Run the network that `in_precision` made of it."""
        images, eager = self._recorded.pixel_values, self._recorded.outputs
        outputs = self._run(module, images, functools.partial(SummedInFloat32, torch_dtype(precision)))
        how = f"{precision} with products summed in float32 and rounded once, from float32, on {len(images)} images"
        self.narrow = self._measure(outputs, eager, UNIT_ROUNDOFF[precision], how)
        return self.narrow

    def run_unrounded(self, module: nn.Module, inputs: Images) -> Outputs:
        """What a module of half precision gives in float32, with its weights as they are, for the same images."""
        return self._run(module, inputs[:FLOAT64_IMAGES], IN_FLOAT32)

    def float32_tolerances(self) -> tuple[Tolerance, ...]:
        """Those of the network in float32, whatever the precision of the artifact."""
        return tolerances(self.float32, self._specs, "fp32")

    def tolerances(self, precision: Precision) -> tuple[Tolerance, ...]:
        """Those of an artifact in this precision."""
        strict = tolerances(self.narrow or self.float32, self._specs, precision)
        return strict + (() if self._fast is None else tolerances(self._fast, self._specs, precision, "fast"))

    def _run(self, module: nn.Module, images: Images, mode: Callable[[], AbstractContextManager[Any]]) -> Outputs:
        return {spec.name: array for spec, array in zip(self._specs, run_in(module, images, mode))}

    def _measure(self, rounded: Outputs, exact: Outputs, roundoff: float, how: str) -> Rounding:
        return measure_rounding(rounded, exact, self._recorded.outputs, self._specs, roundoff, how)
