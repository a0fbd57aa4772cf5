"""ONNX programs that give values from inside, by outputs that are added to the graph as it is opened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.backends.base import Array, Options, programs_of, unreadable_program
from npu_runtime.backends.inference_session import SessionOpener, require_provider
from npu_runtime.backends.onnx_bytes import read_nodes
from npu_runtime.backends.probed import Place, ProbedCall, Value
from npu_runtime.devices import Device


class ProbedOnnx:
    """A place is the name of a value in the graph."""

    def __init__(self, artifact: Artifact, device: Device, options: Options) -> None:
        require_provider(device)
        (program,) = programs_of(artifact, "onnx", options)
        self._path = artifact.path / program.file
        self._opener = SessionOpener(device, options)
        self._input = artifact.manifest.inputs[0].name
        self._outputs = [output.name for output in artifact.manifest.outputs]
        try:
            self._nodes, self._given = read_nodes(self._path.read_bytes())
        except ValueError as error:  # what is no protobuf message, or holds names that are no UTF-8
            raise unreadable_program(self._path, error, "this reader") from error

    def places(self) -> Sequence[Place]:
        made = {name for node in self._nodes for name in node.outputs if name}
        return [
            Place(name, node.operator, tuple(taken for taken in node.inputs if taken in made))
            for node in self._nodes
            for name in node.outputs
            if name
        ]

    @contextlib.contextmanager
    def open(self, places: Sequence[str]) -> Iterator[ProbedCall]:
        added = [place for place in dict.fromkeys(places) if place not in self._given]
        session, _ = self._opener.open(self._path, added)
        names = list(dict.fromkeys([*self._outputs, *places]))

        def call(pixel_values: Images) -> tuple[dict[str, Array], list[Value]]:
            results = dict(zip(names, session.run(names, {self._input: pixel_values})))
            return {name: results[name] for name in self._outputs}, [results[place] for place in places]

        yield call

    def close(self) -> None:
        pass
