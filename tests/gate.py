"""The export's own judgement of a network, without freezing it: what it would say of a program of another network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from outliers import Outliers, plant
from torch import nn

from npu_export.encoders.spec import EncoderSpec
from npu_export.network import load_network, plan_weights
from npu_export.precision import in_precision, torch_dtype
from npu_export.proof.arithmetic import SummedInFloat32, run_in
from npu_export.proof.limits import FLOAT64_IMAGES, margins
from npu_export.proof.rounding import IN_FLOAT32, RoundingStudy
from npu_export.reference import Recorded
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Manifest, Numerics, Precision, TensorSpec, Tolerance
from npu_runtime.parity.inputs import seeded_images
from npu_runtime.parity.measure import Measurement, Outputs
from npu_runtime.parity.records import OutputParity

Change = Callable[[Any], None]
Pool = Callable[[Outputs], Outputs]
SEEDS = (0, 1, 2, 3)


class Gate:
    """A float32 network, what gives its outputs, and the limits that follow from both."""

    def __init__(
        self,
        network: nn.Module,
        with_outputs: Callable[[nn.Module], nn.Module],
        specs: Sequence[TensorSpec],
        images: np.ndarray[Any, np.dtype[np.float32]],
    ) -> None:
        self.network, self.specs, self.images = network, specs, images
        self._with_outputs = with_outputs
        module = with_outputs(network)
        self.reference = self._named(run_in(module, images, torch.no_grad))
        self.study = RoundingStudy(Recorded(images, images, self.reference), specs)
        self.study.run_float64(module)
        self.study.run_fast(module)
        self._tolerances: dict[Precision, tuple[Tolerance, ...]] = {}
        self._unrounded: dict[Precision, Outputs] = {}

    def network_with(self, change: Change | None = None) -> nn.Module:
        """A network of its own, changed."""
        network = copy.deepcopy(self.network)
        if change is not None:
            with torch.no_grad():
                change(network)
        return network

    def module(self, precision: Precision, change: Change | None = None) -> nn.Module:
        """The outputs of a changed network in a precision."""
        return in_precision(self._with_outputs(self.network_with(change)), precision)

    def tolerances(self, precision: Precision) -> tuple[Tolerance, ...]:
        """Those of an artifact of the network, fast numerics among them."""
        if precision not in self._tolerances:
            if precision != "fp32":
                self.study.run_narrow(self.module(precision), precision)
            self._tolerances[precision] = self.study.tolerances(precision)
        return self._tolerances[precision]

    def limit(self, precision: Precision, name: str, device: str, numerics: Numerics = "strict") -> float:
        """A limit of an artifact of the network on a kind of device."""
        manifest = object.__new__(Manifest)
        object.__setattr__(manifest, "tolerances", self.tolerances(precision))
        object.__setattr__(manifest, "margins", margins(precision))
        return next(t.limit for t in manifest.tolerances_on(device, numerics) if t.name == name)

    def outputs(self, precision: Precision, change: Change | None = None) -> Outputs:
        """What a program of the changed network gives in a precision."""
        narrow = functools.partial(SummedInFloat32, torch_dtype(precision))
        mode = torch.no_grad if precision == "fp32" else narrow
        return self._named(run_in(self.module(precision, change), self.images, mode))

    def unrounded(self, precision: Precision, change: Change | None = None) -> Outputs:
        """What it gives without its rounding, for the first images."""
        return self._named(run_in(self.module(precision, change), self.images[:FLOAT64_IMAGES], IN_FLOAT32))

    def judge(self, outputs: Outputs, precision: Precision) -> tuple[OutputParity, ...]:
        """The outputs of a precision against the reference."""
        return self._judge(outputs, self.reference, self.tolerances(precision))

    def judge_unrounded(self, outputs: Outputs, precision: Precision) -> tuple[OutputParity, ...]:
        """Those without rounding against those of the right network."""
        if precision not in self._unrounded:
            self._unrounded[precision] = self.unrounded(precision)
        return self._judge(outputs, self._unrounded[precision], self.study.float32_tolerances())

    def refuses(self, change: Change, precision: Precision, pool: Pool = lambda outputs: outputs) -> bool:
        """Whether a program of the changed network, its outputs pooled otherwise, is refused at its export."""
        if beyond(self.judge(pool(self.outputs(precision, change)), precision)):
            return True
        if precision == "fp32":
            return False
        return bool(beyond(self.judge_unrounded(pool(self.unrounded(precision, change)), precision)))

    def _named(self, arrays: list[np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return {spec.name: array for spec, array in zip(self.specs, arrays)}

    def _judge(
        self, outputs: Outputs, expected: Outputs, tolerances: tuple[Tolerance, ...]
    ) -> tuple[OutputParity, ...]:
        measurement = Measurement(self.specs, self.reference)
        measurement.add(outputs, expected)
        return measurement.results([t for t in tolerances if t.numerics == "strict"])


def gate_of(encoder: EncoderSpec, outliers: Outliers, seeds: tuple[int, ...] = SEEDS) -> Gate:
    """The gate of an encoder with seeded weights and outliers in them."""
    images = seeded_images(seeds, encoder.inputs[0].of_batch(1)[1:])
    network = load_network(plan_weights(encoder, find_weights(encoder, "random:0")))
    plant(network, outliers, images)
    return Gate(network, encoder.with_outputs, encoder.outputs, images)


def beyond(results: tuple[OutputParity, ...]) -> list[str]:
    """The checks that failed."""
    return [check.name for result in results for check in result.checks if not check.passed]


def largest_share(results: tuple[OutputParity, ...]) -> float:
    """The largest value as a share of its limit."""
    return max(check.value / check.limit for result in results for check in result.checks)
