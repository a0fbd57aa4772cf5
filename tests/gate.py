"""The export's own judgement of a network, without freezing it: what it would say of a program of another network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from outliers import Outliers, plant
from torch import nn

from npu_export.encoders.spec import EncoderSpec
from npu_export.network import load_network, plan_weights
from npu_export.precision import in_precision, torch_dtype
from npu_export.proof.arithmetic import SummedInFloat32, run_in
from npu_export.proof.limits import FLOAT64_IMAGES
from npu_export.proof.rounding import IN_FLOAT32, RoundingStudy
from npu_export.reference import Recorded
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Precision, Tolerance
from npu_runtime.parity.inputs import seeded_images
from npu_runtime.parity.measure import Measurement, Outputs
from npu_runtime.parity.records import OutputParity

Change = Callable[[Any], None]
Pool = Callable[[Outputs], Outputs]
SEEDS = (0, 1, 2, 3)


class Gate:
    """An encoder with seeded weights and outliers in them, and the limits that follow."""

    def __init__(self, encoder: EncoderSpec, outliers: Outliers, seeds: tuple[int, ...] = SEEDS) -> None:
        self.encoder = encoder
        self.images = seeded_images(seeds, encoder.inputs[0].of_batch(1)[1:])
        self.network = load_network(plan_weights(encoder, find_weights(encoder, "random:0")))
        plant(self.network, outliers, self.images)
        module = encoder.with_outputs(self.network)
        self.reference = self._named(run_in(module, self.images, torch.no_grad))
        recorded = Recorded(self.images, self.images, self.reference)
        self._study = RoundingStudy(recorded, encoder.outputs)
        self._study.run_float64(module)
        self._study.run_fast(module)

    def network_with(self, change: Change | None = None) -> nn.Module:
        """A network of its own, changed."""
        network = copy.deepcopy(self.network)
        if change is not None:
            with torch.no_grad():
                change(network)
        return network

    @functools.cache  # noqa: B019 - a gate lives as long as its tests
    def tolerances(self, precision: Precision) -> tuple[Tolerance, ...]:
        if precision != "fp32":
            self._study.run_narrow(self._module(self.network_with(), precision), precision)
        return self._study.tolerances(precision)

    def outputs(self, network: nn.Module, precision: Precision) -> Outputs:
        """What a program of this network gives in a precision; the network is used up."""
        if precision == "fp32":
            return self._named(run_in(self._module(network, precision), self.images, torch.no_grad))
        mode = functools.partial(SummedInFloat32, torch_dtype(precision))
        return self._named(run_in(self._module(network, precision), self.images, mode))

    def unrounded(self, network: nn.Module, precision: Precision) -> Outputs:
        """What it gives without its rounding; the network is used up."""
        return self._named(run_in(self._module(network, precision), self.images[:FLOAT64_IMAGES], IN_FLOAT32))

    def judge(self, outputs: Outputs, precision: Precision) -> tuple[OutputParity, ...]:
        """The outputs of a precision against the reference."""
        return self._judge(outputs, self.reference, self.tolerances(precision))

    def judge_unrounded(self, outputs: Outputs, precision: Precision) -> tuple[OutputParity, ...]:
        """Those without rounding against those of the right network."""
        return self._judge(outputs, self._right_unrounded(precision), self._study.float32_tolerances())

    def refuses(self, change: Change, precision: Precision, pool: Pool | None = None) -> bool:
        """Whether a program of the changed network, its outputs pooled otherwise, is refused at its export."""
        outputs = self.outputs(self.network_with(change), precision)
        if beyond(self.judge(outputs if pool is None else pool(outputs), precision)):
            return True
        if precision == "fp32":
            return False
        unrounded = self.unrounded(self.network_with(change), precision)
        return bool(beyond(self.judge_unrounded(unrounded if pool is None else pool(unrounded), precision)))

    @functools.cache  # noqa: B019
    def _right_unrounded(self, precision: Precision) -> Outputs:
        return self.unrounded(self.network_with(), precision)

    def _module(self, network: nn.Module, precision: Precision) -> nn.Module:
        return in_precision(self.encoder.with_outputs(network), precision)

    def _named(self, arrays: list[np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return {spec.name: array for spec, array in zip(self.encoder.outputs, arrays)}

    def _judge(
        self, outputs: Outputs, expected: Outputs, tolerances: tuple[Tolerance, ...]
    ) -> tuple[OutputParity, ...]:
        measurement = Measurement(self.encoder.outputs, self.reference)
        measurement.add(outputs, expected)
        return measurement.results([t for t in tolerances if t.numerics == "strict"])


def beyond(results: tuple[OutputParity, ...]) -> list[str]:
    """The checks that failed."""
    return [check.name for result in results for check in result.checks if not check.passed]


def largest_share(results: tuple[OutputParity, ...]) -> float:
    """The largest value as a share of its limit."""
    return max(check.value / check.limit for result in results for check in result.checks)


def limits_by_name(tolerances: tuple[Tolerance, ...]) -> Mapping[str, float]:
    return {t.name: t.limit for t in tolerances if t.numerics == "strict"}
