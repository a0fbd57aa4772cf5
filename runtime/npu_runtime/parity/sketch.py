"""Sketches of tensors: a few sums, from which the norm of a difference is told without either tensor.

A count sketch (Charikar, Chen and Farach-Colton, Finding frequent items in data streams, 2002) gives each element a
bucket and a sign, and sums the signed elements of each bucket. It is linear, and its squared norm is the tensor's in
the mean, with a deviation of sqrt(2 / WIDTH) of it at most: the norm is right within some 5 %, however the elements
are spread, and exactly where there is one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH = 256
"""Buckets."""
SEED = 0
Sketch = npt.NDArray[np.float64]


def sketch_rows(rows: npt.NDArray[Any]) -> Sketch:
    """The sketches [N, WIDTH], float64, of each of `rows` [N, ...]; NaN or infinite where elements are."""
    flat = rows.reshape(len(rows), -1)
    places = _signed_buckets(flat.shape[1])
    sums: npt.NDArray[Any] = np.stack([np.bincount(places, weights=row, minlength=2 * WIDTH) for row in flat])
    with np.errstate(invalid="ignore"):  # infinity - infinity is NaN
        sketches: Sketch = sums[:, :WIDTH] - sums[:, WIDTH:]
    return sketches


def over_scale(rows: npt.NDArray[Any], scale: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """`rows` [N, ...] over a scale of channels, [D] of rows [..., D] or [C, 1] of rows [C, ...], as [N, size].

    The rows may come in any shape that holds their elements in that order.
    """
    size = math.prod(rows.shape[1:])
    if scale.ndim == 0 or size % scale.size:
        return rows.reshape(len(rows), size) / (scale if scale.ndim == 0 else np.float32(math.nan))
    by_channel = (scale.size, -1) if scale.ndim == 2 else (-1, scale.size)
    return (rows.reshape(len(rows), *by_channel) / scale).reshape(len(rows), size)


def norm_rows(rows: npt.NDArray[Any]) -> Sketch:
    """The L2 norms [N], float64, of each of `rows` [N, ...]."""
    return np.array([np.linalg.norm(row.astype(np.float64).ravel()) for row in rows])


def relative_errors(actual: Sketch, expected: Sketch, norms: Sketch) -> Sketch:
    """Estimates [N] of ||a - e|| / ||e|| from both sketches [N, WIDTH] and the norms of e [N].

    0 where both are zero, infinite where only e is, NaN where a holds no number.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.linalg.norm(actual - expected, axis=1)
        return np.where(norms == 0, np.where(difference == 0, 0.0, np.inf), difference / norms)


@functools.lru_cache(maxsize=4)
def _signed_buckets(count: int) -> npt.NDArray[np.int64]:
    """For each of `count` elements a bucket, WIDTH added for a negative sign.

    From the generator's raw numbers, which numpy keeps the same in every version (NEP 19), as it does not those of
    distributions: an artifact's sketches are read by other versions than wrote them.
    """
    words = np.random.PCG64(np.random.SeedSequence((SEED, count))).random_raw(count)
    return (words % (2 * WIDTH)).astype(np.int64)
