"""How the errors of single tokens are distributed, in few enough figures for a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.store import Array

Errors = npt.NDArray[np.float64]

PERCENTS = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class TokenErrors:
    """The relative L2 errors of tokens, of all images together."""

    tokens: int
    quantiles: tuple[float, ...]
    """At each of PERCENTS the least error that at least so many percent of the tokens do not exceed."""
    worst_token: int
    """Row of the output [T, D] with the largest error, the first of equals; of a kind of tokens counted from its own
    first."""
    worst_image: int
    """Number of its image among the step's inputs."""


def measure_tokens(actual: Array, expected: Array) -> Errors:
    """||a - e|| / ||e|| in float64 of each row of two arrays [T, D].

    0 where both are zero; infinite where only `e` is, and where `a` or `e` holds NaN or infinity, so that
    what is broken is the largest.
    """
    finite: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(actual) & np.isfinite(expected), axis=1)
    a, e = (np.where(finite[:, None], x, 0).astype(np.float64) for x in (actual, expected))
    difference = np.sqrt(((a - e) ** 2).sum(axis=1))
    norm = np.sqrt((e * e).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(difference == 0, 0.0, difference / norm)
    return np.where(finite, errors, np.inf)


def summarise_tokens(images: Sequence[Errors]) -> TokenErrors:
    """The distribution over the tokens [T] of at least one image, of one T."""
    errors = np.stack(images)
    ordered = np.sort(errors, axis=None)
    count = errors.size
    image, token = np.unravel_index(int(errors.argmax()), errors.shape)
    return TokenErrors(
        count,
        tuple(float(ordered[max(-(-count * percent // 100), 1) - 1]) for percent in PERCENTS),
        int(token),
        int(image),
    )
