"""The scale of each channel of an output, by which errors there are measured.

Trained encoders have channels a hundred or a thousand times the rest (Sun et al., Massive Activations in Large Language
Models, 2024). Rounding is relative, so that an error which is nothing in such a channel is a fault in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.schema import TensorSpec

Array = npt.NDArray[np.float32]


def channel_scale(values: npt.NDArray[Any]) -> Array:
    """The scale [D] of each channel of values [..., D]: the median of its |values|, at least the median channel's.

    Medians, so that a few massive tokens do not set the scale of a channel for all; the floor, so that a channel near
    zero does not count rounding of its own sums as an error many times its size. NaN where values are.
    """
    sizes = np.abs(values.reshape(-1, values.shape[-1]).astype(np.float64))
    own = np.median(sizes, axis=0)
    scale: Array = np.maximum(own, np.median(own)).astype(np.float32)
    return scale


def output_scales(outputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """For each output [N, D] its scales [D], and for each [N, T, D] those of each kind of tokens, as [T, D]."""
    return {spec.name: _scale_of(outputs[spec.name], spec) for spec in specs}


def _scale_of(values: Array, spec: TensorSpec) -> Array:
    if values.ndim == 2:
        return channel_scale(values)
    scale = np.empty(values.shape[1:], np.float32)
    scale[:] = channel_scale(values)  # of tokens of no kind
    for group in spec.groups:
        scale[group.start : group.stop] = channel_scale(values[:, group.start : group.stop])
    return scale
