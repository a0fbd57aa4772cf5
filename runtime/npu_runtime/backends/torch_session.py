"""Sessions of programs that run on torch: on the CPU as they are, on an accelerator prepared and replayed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.backends.base import Array, GraphReport, Options, SessionReport, StageTimes
from npu_runtime.devices import Device, cpu_count
from npu_runtime.devices.ambient import without_autocast
from npu_runtime.devices.failures import ending_whatever_failed, failures_of
from npu_runtime.devices.numerics import HeldNumerics
from npu_runtime.errors import ArtifactError
from npu_runtime.torch_interop import array_from_tensor, set_threads, tensor_from_array

if TYPE_CHECKING:
    import torch

    from npu_runtime.backends.device_program import DeviceProgram

Call = Callable[["torch.Tensor"], Sequence["torch.Tensor"]]
"""A program for one batch size: `pixel_values` -> the outputs in the manifest's order."""


WEIGHTS_TOO_LARGE = "the weights alone do not fit: end other processes on the device, or take one with more memory"
TAKEN_SINCE = "something else took memory since the encoder was loaded: call again once it is free"


class OpenPrograms(Protocol):
    """What a backend gives a session: the programs, opened on the device once its numerics are set."""

    def __call__(self, device: Device, batches: Sequence[int]) -> Mapping[int, Call]: ...


def open_torch_session(artifact: Artifact, device: Device, options: Options, programs: OpenPrograms) -> TorchSession:
    """Set threads and numerics, open the programs, and prepare each batch size on an accelerator.

    Whatever fails, the numerics are put back and the device's memory is given back.
    """
    set_threads(options.threads, cpu_count())
    numerics = HeldNumerics(device, options.numerics)
    session = TorchSession(artifact, device, options, numerics)
    weakref.finalize(session, numerics.release).atexit = False  # of an encoder that nobody closed
    try:
        with without_autocast(device.kind):
            session.open(programs)
    except BaseException:
        session.close()
        raise
    return session


class TorchSession:
    """Programs by batch size on one device. On an accelerator they run one at a time, in the order of the calls."""

    def __init__(self, artifact: Artifact, device: Device, options: Options, numerics: HeldNumerics) -> None:
        self._path = artifact.path
        self._input = artifact.manifest.inputs[0]
        self._outputs = artifact.manifest.outputs
        self._names = [output.name for output in self._outputs]
        self._device = device
        self._options = options
        self._manifest = artifact.manifest
        self._numerics = numerics
        self._calls: dict[int, Call] = {}
        self._prepared: dict[int, DeviceProgram] = {}
        self._lock = threading.Lock()
        self._report = SessionReport(numerics.describe())

    def open(self, programs: OpenPrograms) -> None:
        if self._device.kind == "cpu":
            self._calls.update(programs(self._device, self._options.batches))
            return
        from npu_runtime.backends.device_program import DeviceProgram
        from npu_runtime.backends.replay import replay_limits
        from npu_runtime.devices.accelerator import Accelerator
        from npu_runtime.devices.arithmetic import measure_arithmetic, require_exact
        from npu_runtime.devices.operators import refuse_fallback

        accelerator = Accelerator(self._device)
        options = self._options
        limits = replay_limits(self._manifest, self._device.kind)
        fallback: dict[str, None] = {}
        graphs: list[GraphReport] = []
        arithmetic = None
        with failures_of(accelerator, memory_hint=WEIGHTS_TOO_LARGE), accelerator.current():
            with failures_of(accelerator, where="the weights", memory_hint=WEIGHTS_TOO_LARGE):
                calls = programs(self._device, options.batches)
            for batch, call in calls.items():
                with failures_of(accelerator, where=f"batch {batch}", memory_hint=self._memory_hint(batch)):
                    program = self._prepared[batch] = DeviceProgram(accelerator, call, self._input, batch, limits)
                    operators, outputs = program.first_run()
                    self._check_results(outputs, batch)
                    if not options.allow_fallback:
                        refuse_fallback(operators, self._device)
                    if arithmetic is None:  # of the first batch size: the others make the same calls with more rows
                        arithmetic = measure_arithmetic(accelerator.torch_device, operators.calls)
                    require_exact(arithmetic, operators.names, self._device, options.numerics)
                    fallback.update(dict.fromkeys((*operators.fallback, *operators.host)))
                    del outputs
                    if options.graph:
                        graphs.append(program.capture(required=options.graph is True))
        self._report = SessionReport(self._numerics.describe(), arithmetic, tuple(fallback), tuple(graphs))

    def run(self, pixel_values: Images, outputs: Sequence[str]) -> list[Array]:
        batch = len(pixel_values)
        wanted = [self._names.index(name) for name in outputs]
        if self._prepared:
            with self._on_device(batch) as program:
                return program.run(pixel_values, wanted)
        import torch

        with torch.inference_mode(), without_autocast("cpu"):
            results = self._calls[batch](tensor_from_array(pixel_values))
        self._check_results(results, batch)
        return [array_from_tensor(results[index]) for index in wanted]

    def time_stages(self, pixel_values: Images, outputs: Sequence[str]) -> StageTimes | None:
        """The stages of a call on an accelerator; None on the CPU, which has one."""
        if self._device.kind == "cpu":
            return None
        with self._on_device(len(pixel_values)) as program:
            return program.time_stages(pixel_values, [self._names.index(name) for name in outputs])

    def report(self) -> SessionReport:
        self._numerics.check()
        return self._report

    def close(self) -> None:
        with self._lock:
            self._calls.clear()
            programs, self._prepared = self._prepared, {}
            accelerator = next((program.accelerator for program in programs.values()), None)
            while programs:
                with ending_whatever_failed():
                    programs.popitem()[1].close()
        self._numerics.release()
        if accelerator is not None:
            with ending_whatever_failed():
                accelerator.release()

    @contextlib.contextmanager
    def _on_device(self, batch: int) -> Iterator[DeviceProgram]:
        """The program of a batch size, for one caller at a time."""
        self._prepared[batch].accelerator.check_process()  # before the lock, which a fork may have copied locked
        with self._lock, without_autocast(self._device.kind):
            program = self._prepared[batch]
            with failures_of(program.accelerator, where=f"a call at batch {batch}", memory_hint=TAKEN_SINCE):
                yield program

    def _memory_hint(self, batch: int) -> str:
        """What to do where the memory does not suffice to prepare a batch size."""
        smaller = sorted({program.batch for program in self._manifest.programs if program.batch < batch})
        sizes = ", ".join(map(str, smaller))
        hint = (
            f"leave out batch size {batch} and larger: bench --batch {sizes.replace(' ', '')}, load(batches=[{sizes}])"
        )
        if not smaller:
            hint = "not even the smallest batch size fits: end other processes on the device"
        return f"{hint}; graphs take memory too: --graph off, load(graph=False)" if self._options.graph else hint

    def _check_results(self, results: object, batch: int) -> None:
        """The outputs are the manifest's, in its order; a TorchScript file does not say so itself."""
        expected = [f"{output.dtype} {list(output.of_batch(batch))}" for output in self._outputs]
        given = results if isinstance(results, (tuple, list)) else ()
        got = [f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.") for tensor in given]
        if got != expected:
            raise ArtifactError(
                "the program gives other outputs than the manifest says",
                where=self._path,
                expected=f"a tuple of {', '.join(expected)}",
                got=", ".join(got) or type(results).__name__,
                hint="export the artifact again",
            )
