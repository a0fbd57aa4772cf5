"""TorchScript programs that give values from inside, by a copy of the graph whose constants are the same tensors."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.backends.base import Array, Options, missing_package, programs_of
from npu_runtime.backends.probed import Place, ProbedCall, Value
from npu_runtime.backends.torchscript import open_entry_points
from npu_runtime.devices import Device, cpu_count
from npu_runtime.devices.ambient import without_autocast
from npu_runtime.devices.numerics import HeldNumerics
from npu_runtime.devices.torch_import import import_torch
from npu_runtime.errors import ArtifactError, UnavailableError
from npu_runtime.torch_interop import array_from_tensor, set_threads, tensor_from_array

if TYPE_CHECKING:
    import torch

FROM_GRAPH = "_create_function_from_graph"
"""torch._C's function that makes a callable of a graph. No public one does."""


class ProbedTorchScript:
    """A place is `KIND:INDEX`, the number of an operator among those of its kind in the loaded program."""

    def __init__(self, artifact: Artifact, device: Device, options: Options) -> None:
        try:
            import_torch()
        except ImportError as error:
            raise missing_package("torch", "torch", "torchscript") from error
        import torch

        if not hasattr(torch._C, FROM_GRAPH):
            raise UnavailableError(
                "this torch does not run a program with values from inside as outputs",
                expected=f"torch._C.{FROM_GRAPH}, which torch 2.7 to 2.13 have",
                got=f"torch {torch.__version__}",
                hint="look into the ONNX program, or use another torch",
            )
        programs = programs_of(artifact, "torchscript", options)
        set_threads(options.threads, cpu_count())
        self._device = device
        self._outputs = [output.name for output in artifact.manifest.outputs]
        self._path = artifact.path / programs[0].file
        self._numerics = HeldNumerics(device, options.numerics)
        try:
            with self._current("the weights"):
                (method,) = open_entry_points(artifact.path, programs, device).values()
                self._graph: Any = method.graph
        except BaseException:
            self.close()
            raise

    def places(self) -> Sequence[Place]:
        tensors = _tensors_by_place(self._graph)
        names = {tensor.debugName(): name for name, tensor in tensors.items()}

        def taken(node: Any) -> tuple[str, ...]:
            return tuple(names[value.debugName()] for value in node.inputs() if value.debugName() in names)

        return [Place(name, tensor.node().kind(), taken(tensor.node())) for name, tensor in tensors.items()]

    @contextlib.contextmanager
    def open(self, places: Sequence[str]) -> Iterator[ProbedCall]:
        import torch

        function = self._function(places)

        def call(pixel_values: Images) -> tuple[dict[str, Array], list[Value]]:
            # Optimising takes longer than the few runs that this function sees.
            plain = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
            with self._current("a call"), torch.inference_mode(), plain:
                outputs, *values = function(tensor_from_array(pixel_values).to(str(self._device)))
                return dict(zip(self._outputs, map(_array, outputs))), [_array(tensor) for tensor in values]

        yield call
        self._numerics.check()

    def close(self) -> None:
        self._graph = None
        self._numerics.release()
        if self._device.kind != "cpu":
            from npu_runtime.devices.accelerator import Accelerator
            from npu_runtime.devices.failures import ending_whatever_failed

            with ending_whatever_failed():
                Accelerator(self._device).release()

    def _function(self, places: Sequence[str]) -> Any:
        """The program from `pixel_values` to its tuple of outputs, and the values behind it."""
        import torch

        graph = self._graph.copy()
        module, *_ = graph.inputs()
        if module.uses():
            raise ArtifactError(
                "the TorchScript program is not frozen",
                where=self._path,
                expected="weights as constants",
                got="a program that reads attributes of its module",
                hint="export the artifact again",
            )
        graph.eraseInput(0)
        tensors = _tensors_by_place(graph)
        values = [*graph.outputs(), *(tensors[place] for place in places)]
        joined = graph.create("prim::TupleConstruct", values, 1)
        graph.appendNode(joined)
        joined.output().setType(torch._C.TupleType([value.type() for value in values]))
        graph.eraseOutput(0)
        graph.registerOutput(joined.output())
        return getattr(torch._C, FROM_GRAPH)("probed", graph)

    @contextlib.contextmanager
    def _current(self, doing: str) -> Iterator[None]:
        """The device is torch's current one, nothing is cast, and failures of an accelerator are told as such."""
        with contextlib.ExitStack() as stack:
            if self._device.kind != "cpu":
                from npu_runtime.devices.accelerator import Accelerator
                from npu_runtime.devices.failures import failures_of

                accelerator = Accelerator(self._device)
                hint = "end other processes on the device, or look into the program on the CPU"
                stack.enter_context(accelerator.current())
                stack.enter_context(failures_of(accelerator, where=doing, memory_hint=hint))
            stack.enter_context(without_autocast(self._device.kind))
            yield


def _tensors_by_place(graph: Any) -> dict[str, Any]:
    """The values of operators that make one tensor, in the graph's order."""
    counts = Counter[str]()
    tensors = {}
    for node in graph.nodes():
        kind = node.kind()
        if not kind.startswith("prim::") and node.outputsSize() == 1 and node.output().type().kind() == "TensorType":
            tensors[f"{kind}:{counts[kind]}"] = node.output()
        counts[kind] += 1
    return tensors


def _array(tensor: torch.Tensor) -> Array:
    """In memory that the caller owns; half precision, of which numpy has one kind, as float32."""
    import torch

    return array_from_tensor(tensor.to("cpu", torch.float32, copy=True))
