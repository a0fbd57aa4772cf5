"""Seeded weights for where no published ones can be had. Only ever made when asked for by name."""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import numpy.typing as npt

LAYER_SCALES = ("gamma", "gamma_1", "gamma_2", "lambda1")
"""Names that the encoders' networks give the factors of their residual branches."""


def parse_seed(text: str) -> int | None:
    """The seed that a text spells in decimal digits; None where it spells none."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def seeded_tensor(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """A float32 tensor that depends on the seed, its name and its shape alone, not on any order.

    No tensor is all zeros or ones, since those hide a wrong remap: norms are 1 ± 0.1, layer scales 0.25 ± 0.1,
    biases and tokens ± 0.1; matrices and kernels have the variance 1 / fan-in that keeps activations, and the
    logits of attention, of order one, without which rounding grows from layer to layer.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
    values = np.asarray(generator.standard_normal(shape, np.float32))
    leaf = re.split(r"[./]", name)[-1]
    if leaf in LAYER_SCALES:
        return np.float32(0.25) + np.float32(0.1) * values
    if leaf in ("weight", "scale") and len(shape) == 1:
        return np.float32(1) + np.float32(0.1) * values
    if leaf.endswith("weight"):
        return values * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    if leaf == "kernel":  # flax: [..., in, out], or [in, heads, out] where a projection is split over heads
        split = name.endswith(("query/kernel", "key/kernel", "value/kernel"))
        return values * np.float32(1 / math.sqrt(shape[0] if split else math.prod(shape[:-1])))
    return np.asarray(values * np.float32(0.1))
