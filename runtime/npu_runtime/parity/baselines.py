"""What a step's outputs are compared with: recorded outputs, or those of an open session."""

from __future__ import annotations

from typing import Protocol

from npu_runtime.artifact.store import Artifact
from npu_runtime.encoder import Encoder
from npu_runtime.parity.inputs import KEPT_NBYTES, Inputs, reference_inputs
from npu_runtime.parity.measure import Outputs

STORED = "stored reference"


class Baseline(Protocol):
    """What a step's outputs are compared with."""

    name: str
    inputs: Inputs

    def outputs(self, start: int, stop: int) -> Outputs:
        """Those of images `start` to `stop`."""
        ...


class StoredReference:
    """The artifact's recorded images and outputs."""

    name = STORED

    def __init__(self, artifact: Artifact) -> None:
        self.inputs = Inputs(reference_inputs(artifact))
        _, self._expected = artifact.read_reference()

    def outputs(self, start: int, stop: int) -> Outputs:
        return {name: array[start:stop] for name, array in self._expected.items()}


class LiveBaseline:
    """An open session; what it gave is kept while it is small, and else run again."""

    def __init__(self, title: str, encoder: Encoder, inputs: Inputs) -> None:
        self.name = title
        self.inputs = inputs
        self._encoder = encoder
        self._kept: dict[tuple[int, int], Outputs] = {}
        self._room = KEPT_NBYTES

    def outputs(self, start: int, stop: int) -> Outputs:
        if (start, stop) in self._kept:
            return self._kept[start, stop]
        outputs = self._encoder.run(self.inputs.rows(start, stop), allow_nonfinite=True)
        nbytes = sum(array.nbytes for array in outputs.values())
        if nbytes <= self._room:
            self._kept[start, stop] = outputs
            self._room -= nbytes
        return outputs
