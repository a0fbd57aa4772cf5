"""Images of random numbers, the same from a seed on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npu_runtime.artifact.schema import InputDtype
from npu_runtime.artifact.store import Images


def draw_images(generator: np.random.Generator, shape: Sequence[int], dtype: InputDtype) -> Images:
    """Standard normal float32, as normalised images about are; or bytes, each as likely."""
    if dtype == "uint8":
        return generator.integers(256, size=shape, dtype=np.uint8)
    return generator.standard_normal(shape, np.float32)
