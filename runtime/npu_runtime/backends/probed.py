"""Frozen programs that give values from inside beside their outputs: the very file, with no second copy of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.backends.base import Array, Options
from npu_runtime.devices import Device
from npu_runtime.errors import ArtifactError, UsageError

Value = npt.NDArray[Any]
ProbedCall = Callable[[Images], tuple[dict[str, Array], list[Value]]]
"""`pixel_values` of the program's batch size -> its outputs by name, float32, and the values asked for.

Arrays belong to the caller. A value has the shape that the program gives it, bfloat16 as float32."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a program has a value."""

    name: str
    """As a manifest's probes spell it."""
    kind: str
    """The operator that makes it."""
    inputs: tuple[str, ...]
    """Names of the places of values that this operator takes, constants left out."""


class ProbedProgram(Protocol):
    """A program of one batch size, which can be run with some of its inner values as outputs."""

    def places(self) -> Sequence[Place]:
        """Every tensor that an operator makes, in the program's order."""
        ...

    def open(self, places: Sequence[str]) -> AbstractContextManager[ProbedCall]:
        """The program with the values at these places, which it has; they are held in memory all at once."""
        ...

    def close(self) -> None:
        """Release the memory; a second call does nothing."""
        ...


@contextlib.contextmanager
def open_probed(artifact: Artifact, device: Device, options: Options, *, backend: str) -> Iterator[ProbedProgram]:
    """The program of the one batch size in `options`, its files checked, as a backend opens it on a device.

    Raises UsageError for a backend without programs of this project's formats, and what the backend's sessions
    raise.
    """
    program: ProbedProgram
    if backend == "onnxruntime":
        from npu_runtime.backends.probed_onnx import ProbedOnnx

        program = ProbedOnnx(artifact, device, options)
    elif backend == "torchscript":
        from npu_runtime.backends.probed_torchscript import ProbedTorchScript

        program = ProbedTorchScript(artifact, device, options)
    else:
        raise UsageError(
            f"the backend {backend} has no program to look into",
            expected="onnxruntime or torchscript",
            got=backend,
        )
    try:
        yield program
    finally:
        program.close()


def require_places(program: ProbedProgram, places: Sequence[str], file: object) -> None:
    """Raise ArtifactError naming the places that the program does not have."""
    known = {place.name for place in program.places()}
    if lost := [place for place in places if place not in known]:
        raise ArtifactError(
            "the program lacks values that the manifest's probes name",
            where=file,
            expected=f"{len(set(places))} values",
            got=f"no {', '.join(lost)}",
            hint="the probes are another program's; export again with --probes",
        )


def rows_of(value: Value, batch: int) -> Value | None:
    """The value as one row for each image [B, ...]; None where it is no floating-point tensor of rows."""
    if not np.issubdtype(value.dtype, np.floating) or value.ndim < 2 or len(value) != batch:
        return None
    return value.reshape(batch, -1)
