"""Seeded weights for where no published ones can be had. Only ever made when asked for by name."""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import numpy.typing as npt


def parse_seed(text: str) -> int | None:
    """The seed that a text spells in decimal digits; None where it spells none."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def seeded_tensor(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """A float32 tensor that depends on the seed, its name and its shape alone, not on any order.

    No tensor is all zeros or ones, since those hide a wrong remap: norms are 1 ± 0.1, biases ± 0.1,
    matrices and kernels have the variance 1 / fan-in that keeps activations of order one.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
    values = generator.standard_normal(shape, np.float32)
    leaf = name.rpartition(".")[2]
    if leaf == "weight" and len(shape) == 1:
        return np.float32(1) + np.float32(0.1) * values
    if leaf == "weight":
        return values * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    return values * np.float32(0.1)
