"""Limits of an artifact's outputs: multiples of what rounding does to this network with these weights.

The eager network is run in float64 on some of the reference's images, and for half precision in a stated model of it on
all. How far eager float32 is from the first, and the second from eager float32, is rounding alone: no right program can
be expected to be nearer, and a wrong one is farther. Both are measured for each output and each kind of tokens, in
metrics that massive channels dominate and in metrics scaled by channel, which they do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from npu_export.errors import PrecisionError
from npu_runtime.artifact.schema import DeviceKind, Margin, Numerics, Precision, TensorSpec, Tolerance, ToleranceMetric
from npu_runtime.parity.measure import Measurement, Outputs

if TYPE_CHECKING:
    from npu_runtime.parity.metrics import Metrics

FLOAT64_IMAGES = 2
"""How many of the reference's images are run in float64, which takes twice as long as float32 or more. One would give
an output [1, D] D errors, but they share what attention makes of that image."""
SWAMPED: tuple[ToleranceMetric, ...] = ("max_abs_error", "max_relative_l2_error")
"""Metrics that a massive channel dominates; judged for whole outputs."""
SCALED: tuple[ToleranceMetric, ...] = ("max_scaled_error", "max_scaled_rmse")
"""Metrics that it does not; judged for kinds of tokens as well."""
UNIT_ROUNDOFF: Mapping[Precision, float] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""The most that rounding changes a number, as a share of it (Higham, Accuracy and Stability of Numerical Algorithms,
section 2.2)."""
TF32_ROUNDOFF = 2.0**-11
DEVIATIONS = 3
"""How many standard deviations of rounding one value may be off."""
MOST = 0.3
"""The most of a channel's scale that rounding may take, as an RMS error: ten times what bfloat16 takes of any of the
five, and three times what it takes with channels of 1000 in a few tokens of tiny networks."""
HINT = "export in fp32; in fp16, --keep-fp32 with the names of modules keeps these in float32"
FACTORS: Mapping[Precision, Mapping[ToleranceMetric, float]] = {
    "fp32": dict.fromkeys((*SWAMPED, *SCALED), 5.0),
    "fp16": {**dict.fromkeys((*SWAMPED, *SCALED), 3.0), "max_scaled_rmse": 2.0},
    "bf16": {**dict.fromkeys((*SWAMPED, *SCALED), 3.0), "max_scaled_rmse": 2.0},
}
"""How many times what rounding does a limit is.

In float32 another program of the same network is 0.8 to 2.5 times as far from eager float32 as that is from float64
(ONNX Runtime, all five and with massive channels of 100 and 1000; docs/margins.md), and any fault a hundred times and
more. In half precision a program rounds at the points where the model does or at fewer, which makes it 0.5 to 1.1
times as far by the scaled RMSE, a mean over thousands of errors, and 0.4 to 1.3 times by a metric that one element
decides; where batch norms are folded into convolutions, whose weights are then rounded otherwise, 1.7 times (trained
EfficientNet-Lite0). What rounding hides is found without it (proof/unrounded.py)."""
PROBE_FACTORS: Mapping[Precision, float] = {"fp32": 10.0, "fp16": 3.0, "bf16": 3.0}
"""The same for the output of a block, whose error is estimated from a sketch, right within a tenth, and which no later
norm brings back into range."""
MARGINS: Mapping[DeviceKind, Mapping[Precision, float]] = {
    "cuda": {"fp32": 10, "fp16": 2, "bf16": 2},
    "npu": {"fp32": 10, "fp16": 2, "bf16": 2},
}
ALLOWS_FOR: Mapping[Precision, str] = {
    "fp32": "for sums in another order and functions (exp, erf, rsqrt) that are right within a few units in the last "
    "place; products in TF32 or HF32 are hundreds of times as far and stay outside",
    "fp16": "for sums in another order and results inside of fused operators that are rounded once more",
    "bf16": "for sums in another order and results inside of fused operators that are rounded once more",
}
"""What a margin allows for; no hardware has confirmed it yet."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What an arithmetic does to the outputs of a network, and how that was found."""

    metrics: Mapping[tuple[str, str | None], Metrics]
    """By output and kind of tokens, None for all."""
    largest: Mapping[str, float]
    """Largest |value| of each output."""
    peak: Mapping[str, float]
    """The most that one value of each output is of its image's L2 norm: near 1 beside a massive channel."""
    roundoff: float
    """Of one number in this arithmetic."""
    how: str
    """What was run against what, in words."""

    def worst(self) -> float:
        """The largest RMS error of an image, each channel over its scale."""
        return max(metrics.max_scaled_rmse or 0.0 for metrics in self.metrics.values())

    def measured(self, output: str, group: str | None, metric: ToleranceMetric) -> float:
        """What rounding does to a metric: never taken as less than the rounding of one number of the output.

        Where a massive channel decides a metric that it dominates, few values do, one for each image of an output
        [N, D], and their errors may be small by luck: they count as three deviations of what the other channels show,
        in proportion to their size.
        """
        found = self.metrics[output, group]
        least = self.roundoff
        if metric in SWAMPED:
            deviations, peak = DEVIATIONS * (found.max_scaled_rmse or 0.0), self.peak[output]
            if metric == "max_abs_error":
                least = self.largest[output] * max(self.roundoff, deviations)
            else:
                least = max(self.roundoff, deviations * peak)
        return max(float(getattr(found, metric)), least)


def measure_rounding(
    rounded: Outputs, exact: Outputs, reference: Outputs, specs: Sequence[TensorSpec], roundoff: float, how: str
) -> Rounding:
    """How far `rounded` outputs are from `exact` ones [n, ...]; channels have the scales of the `reference` [N, ...].

    Raises PrecisionError where the network overflows in the arithmetic, or rounding takes more than `MOST` of a
    channel's scale: limits that follow from noise would let any network pass.
    """
    measurement = Measurement(specs, reference)
    measurement.add(rounded, exact)
    results = measurement.results(())
    if broken := [result.output for result in results if result.group is None and result.metrics.nonfinite]:
        raise PrecisionError(
            "the eager network overflows in this precision, so nothing could be checked",
            where=", ".join(broken),
            expected="finite values",
            got=f"NaN or infinity in {how}",
            hint=HINT,
        )
    rounding = Rounding(
        {(result.output, result.group): result.metrics for result in results},
        {name: float(np.abs(values).max()) for name, values in reference.items()},
        {name: max(map(_peak, values)) for name, values in reference.items()},
        roundoff,
        how,
    )
    if rounding.worst() > MOST:
        raise PrecisionError(
            "rounding takes so much of the outputs that no fault could be told from it",
            where=", ".join(result.output for result in results if result.group is None),
            expected=f"an RMS error of at most {MOST:g} of each channel's scale",
            got=f"{rounding.worst():.2g} by {how}",
            hint=HINT,
        )
    return rounding


def _peak(values: np.ndarray[Any, Any]) -> float:
    norm = float(np.linalg.norm(values.astype(np.float64)))
    return float(np.abs(values).max()) / norm if norm else 0.0


def tolerances(
    rounding: Rounding, specs: Sequence[TensorSpec], precision: Precision, numerics: Numerics = "strict"
) -> tuple[Tolerance, ...]:
    """The tolerances of each output, and of each kind of tokens in it, on the CPU."""
    return tuple(_tolerances(rounding, specs, precision, numerics))


def _tolerances(
    rounding: Rounding, specs: Sequence[TensorSpec], precision: Precision, numerics: Numerics
) -> Iterator[Tolerance]:
    for spec in specs:
        parts: list[str | None] = [None, *(group.name for group in spec.groups)]
        for group in parts:
            for metric in (*SWAMPED, *SCALED) if group is None else SCALED:
                factor, measured = FACTORS[precision][metric], rounding.measured(spec.name, group, metric)
                basis = f"{factor:g} times what rounding does to this network with these weights: {rounding.how}"
                limit = to_two_digits(factor * measured)
                yield Tolerance(spec.name, metric, limit, basis, group=group, numerics=numerics, measured=measured)


def margins(precision: Precision) -> tuple[Margin, ...]:
    """How much farther an accelerator may be from the reference than the CPU."""
    return tuple(
        Margin(device, factors[precision], f"{ALLOWS_FOR[precision]}; not measured on this hardware")
        for device, factors in MARGINS.items()
    )


def to_two_digits(limit: float) -> float:
    """The least number of two digits that is not below a limit."""
    rounded = float(f"{limit:.1e}")
    return rounded if rounded >= limit else float(f"{limit * 1.05:.1e}")
