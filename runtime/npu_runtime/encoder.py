"""Open an artifact and run it: any number of images over the frozen batch sizes.

What `load` needs is imported by it, so that importing the package costs little more than numpy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypedDict, cast
from weakref import WeakSet

import numpy as np

from npu_runtime.batch_plan import plan_batches
from npu_runtime.errors import InputError, ProgramError, UsageError
from npu_runtime.steps import Advance, unwatched

if TYPE_CHECKING:
    from npu_runtime.artifact.schema import Manifest, Numerics
    from npu_runtime.artifact.store import Artifact, Images
    from npu_runtime.backends.base import Array, GraphChoice, Session, SessionReport, StageTimes
    from npu_runtime.devices import Device
    from npu_runtime.stream import OnBad, Source, Stream


class RunOptions(TypedDict, total=False):
    """Where and how `load` runs programs; what measures encoders passes these on."""

    device: str
    threads: int | None
    numerics: Numerics
    graph: GraphChoice
    allow_fallback: bool


def load(
    path: str | os.PathLike[str] | Artifact,
    *,
    device: str = "cpu",
    backend: str | None = None,
    batches: Iterable[int] | None = None,
    threads: int | None = None,
    weights: str | None = None,
    numerics: Numerics = "strict",
    graph: GraphChoice = "auto",
    allow_fallback: bool = False,
) -> Encoder:
    """An encoder over the artifact in a folder.

    `backend` is `onnxruntime` (or `onnx`), `torchscript`, or one that another package adds, such as
    `eager`; without it, ONNX on the CPU where the artifact holds it, else TorchScript. `batches`
    keeps to some of the frozen batch sizes. `threads` sets the CPU threads of one operator, which for torch is a
    setting of the whole process; without it the backend chooses, and no more than the cores that the process may
    use, limits of its cgroups included. `weights` says where the checkpoint lies now, for `eager`.

    `numerics` is `strict`, float32 as float32 and GELU exact, or `fast`, the device's shortcuts, of which the CPU has
    none; torch's are settings of the process, held while the encoder is open. `graph` replays captured graphs on an
    accelerator: `auto` where that works and is faster, True or an error, False never. An operator without a kernel
    for the device is an error unless `allow_fallback` has it run on the CPU, which `report` then tells.

    The files that the backend opens are hashed first. Raises ArtifactError when the artifact is
    missing, changed or too new, UsageError for a backend, batch size or device that does not exist,
    UnavailableError when a package, device or kernel is not on this machine, its memory does not suffice or it
    stopped working, ProgramError when a program mixes devices or the device is less exact than strict numerics ask.
    """
    from npu_runtime.artifact.store import Artifact, open_artifact
    from npu_runtime.backends.base import Options
    from npu_runtime.backends.table import backend_name, choose_backend, find_backend, require_replay
    from npu_runtime.devices import require_device
    from npu_runtime.devices.numerics import NUMERICS

    artifact = path if isinstance(path, Artifact) else open_artifact(path)
    target = require_device(device)
    name = choose_backend(artifact.manifest, target) if backend is None else backend_name(backend)
    opener = find_backend(name)
    if graph is True:
        require_replay(name, target)
    frozen = sorted({p.batch for p in artifact.manifest.programs_for(opener.format)})
    if not frozen:
        raise UsageError(
            f"the artifact holds no program for the backend {name}",
            where=artifact.path,
            expected=" or ".join(artifact.manifest.formats()),
            got=opener.format,
            hint=f"export it again with --format {opener.format}",
        )
    chosen = frozen if batches is None else sorted(set(batches))
    require_frozen(artifact, chosen, frozen)
    if threads is not None and threads < 1:
        raise UsageError("threads must be positive", expected="1 or more", got=threads)
    if numerics not in NUMERICS:
        raise UsageError("unknown numerics", expected=" or ".join(NUMERICS), got=repr(numerics))
    options = Options(tuple(chosen), threads, weights, numerics, graph, allow_fallback)
    session = opener.open(artifact, target, options)
    return Encoder(artifact, name, target, chosen, session)


def require_frozen(artifact: Artifact, batches: Sequence[int], frozen: Sequence[int]) -> None:
    """Raise UsageError unless `batches` are some of the `frozen` sizes."""
    if not batches or set(batches) - set(frozen):
        raise UsageError(
            "the artifact was not frozen for this batch size",
            where=artifact.path,
            expected=", ".join(map(str, frozen)),
            got=", ".join(map(str, batches)) or "none",
            hint="export it again with --batch",
        )


class Encoder:
    """A vision encoder that runs frozen programs. Threads may share it; made by `load`."""

    def __init__(
        self, artifact: Artifact, backend: str, device: Device, batches: Sequence[int], session: Session
    ) -> None:
        self.artifact = artifact
        self.backend = backend
        self.device = device
        self.batches = tuple(batches)
        self._session: Session | None = session
        self._streams: WeakSet[Stream] = WeakSet()
        self._input = self.manifest.inputs[0]
        self._shape = self._input.of_batch(0)[1:]
        self._outputs = {output.name: output for output in self.manifest.outputs}

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    def __call__(self, pixel_values: Images) -> Array:
        """The first output of the manifest, the embedding [N, D], of `pixel_values`; see `run`."""
        name = self.manifest.outputs[0].name
        return self.run(pixel_values, (name,))[name]

    def run(
        self, pixel_values: Images, outputs: Sequence[str] | None = None, *, allow_nonfinite: bool = False
    ) -> dict[str, Array]:
        """Outputs by name, float32 [N, ...], of `pixel_values` as the manifest's input has them, for any N.

        That is float32 [N, 3, H, W], normalised, or uint8 [N, H, W, 3], cut to size.
        Only the outputs asked for are copied; None asks for all. The arrays belong to the caller.
        Raises InputError for another dtype, rank or size, ProgramError when an output holds NaN
        or infinity, unless `allow_nonfinite` says that the caller counts them, and UnavailableError when the device's
        memory was taken since (a later call may succeed) or the device stopped working (none will in this process).
        """
        names = tuple(self._outputs) if outputs is None else tuple(outputs)
        self._check(pixel_values, names)
        session = self._opened()
        count = len(pixel_values)
        plan = plan_batches(count, self.batches)
        if plan == (count,):
            results = dict(zip(names, self._run_batch(session, pixel_values, count, names)))
        else:
            results = {name: np.empty(self._outputs[name].of_batch(count), np.float32) for name in names}
            start = 0
            for size in plan:
                stop = min(start + size, count)
                arrays = self._run_batch(session, pixel_values[start:stop], size, names)
                for name, array in zip(names, arrays):
                    results[name][start:stop] = array[: stop - start]
                start = stop
        for name, array in results.items():
            if not allow_nonfinite and not np.isfinite(array).all():
                raise _nonfinite(name, array, pixel_values)
        return results

    def embed(self, images: Iterable[Source], *, workers: int | None = None, advance: Advance = unwatched) -> Array:
        """The first output of the manifest, embeddings [N, D], of images of any kind that `stream` takes, in order.

        `advance` is told of them a batch at a time. Raises InputError naming an image that cannot be read.
        """
        parts = []
        with self.stream(images, workers=workers) as stream:
            for rows in stream.batches():
                parts.append(np.stack(cast("list[Array]", rows)))
                advance(len(rows))
        return np.concatenate(parts) if parts else self(np.empty((0, *self._shape), self._input.dtype))

    def stream(
        self,
        images: Iterable[Source],
        *,
        output: str | None = None,
        workers: int | None = None,
        on_bad: OnBad = "raise",
    ) -> Stream:
        """Rows of an output, the manifest's first unless it is named, one for each image, in their order.

        An image is a path, the bytes of an image file, a pillow image, a picture as uint8 [H, W, 3] (of torch
        [3, H, W]), or `pixel_values` float32 [3, H, W], which programs that normalise refuse. Arrays may be numpy's or
        torch's; a batch of either counts as its images. An InputError stands for an image that could not be had.

        `images` is read in the thread that asks for rows, ahead of them by no more than `most_in_flight`, whatever
        the caller does; what needs a row before it can give the next image must call the encoder instead.
        `workers` threads decode, as many as the process has cores unless told; a further one runs the largest frozen
        batch as often as it is filled, and the rest with the least padding.

        With `on_bad` "raise" an image that cannot be read raises its InputError where its row would be, and ends
        the stream; with "give" a BadImage with its name and error is given there. The stream is a context manager;
        closing it, or the encoder, ends its threads.
        """
        from npu_runtime.devices.cores import cpu_count
        from npu_runtime.stream import Stream, prepare

        if isinstance(images, (str, bytes, os.PathLike)) or not isinstance(images, Iterable):
            what = "images is one path" if isinstance(images, (str, os.PathLike)) else "images is one image"
            raise InputError(what, expected="a list or another iterable", got=repr(images)[:100], hint="write [image]")
        name = self.manifest.outputs[0].name if output is None else output
        self._check(np.empty((0, *self._shape), self._input.dtype), (name,))
        self._opened()
        stream = Stream(
            images,
            lambda image, called: prepare(image, called, self._input, self.manifest.preprocessing),
            lambda pixel_values: self.run(pixel_values, (name,))[name],
            batch=max(self.batches),
            workers=cpu_count() if workers is None else workers,
            on_bad=on_bad,
        )
        self._streams.add(stream)
        return stream

    def time_stages(self, pixel_values: Images) -> StageTimes | None:
        """Transfer in, compute and transfer out of a call for the first output, on the device's own clock.

        None where they cannot be told apart: on the CPU, and of onnxruntime. `pixel_values` are as many as one of
        `batches`, since a call that is split has several of each.
        """
        name = self.manifest.outputs[0].name
        self._check(pixel_values, (name,))
        if len(pixel_values) not in self.batches:
            raise UsageError(
                "the stages of one program are timed",
                expected=f"as many images as {', '.join(map(str, self.batches))}",
                got=len(pixel_values),
            )
        return self._opened().time_stages(np.ascontiguousarray(pixel_values), (name,))

    def report(self) -> SessionReport:
        """The conditions it runs under. Raises ProgramError when something in the process changed them since."""
        return self._opened().report()

    def close(self) -> None:
        """End its streams and release the session's memory; the encoder cannot run afterwards."""
        for stream in list(self._streams):
            stream.close()
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> Session:
        session = self._session
        if session is None:
            raise UsageError("the encoder is closed", hint="load it again")
        return session

    def _run_batch(self, session: Session, pixel_values: Images, size: int, names: Sequence[str]) -> list[Array]:
        """One program run; rows beyond the images are zero and their outputs mean nothing."""
        if len(pixel_values) < size:
            padded = np.zeros((size, *self._shape), self._input.dtype)
            padded[: len(pixel_values)] = pixel_values
            pixel_values = padded
        return session.run(np.ascontiguousarray(pixel_values), names)

    def _check(self, pixel_values: Images, names: Sequence[str]) -> None:
        expected = f"numpy {self._input.dtype} [N, {', '.join(map(str, self._shape))}]"
        if not isinstance(pixel_values, np.ndarray):
            raise InputError(f"{self._input.name} is no array", expected=expected, got=type(pixel_values).__name__)
        if pixel_values.dtype != self._input.dtype:
            raise InputError(
                f"{self._input.name} has another dtype",
                expected=expected,
                got=f"{pixel_values.dtype} {list(pixel_values.shape)}",
                hint="give pixels that are not normalised: the programs of this artifact do that"
                if self._input.dtype == "uint8"
                else "convert with .astype(numpy.float32)",
            )
        if pixel_values.shape[1:] != self._shape or pixel_values.ndim != len(self._shape) + 1:
            raise InputError(
                f"{self._input.name} has another shape",
                expected=expected,
                got=f"{pixel_values.dtype} {list(pixel_values.shape)}",
                hint="add the batch dimension with array[None]" if pixel_values.shape == self._shape else None,
            )
        unknown = [name for name in names if name not in self._outputs]
        if unknown or not names:
            raise UsageError(
                f"the encoder has no output {', '.join(unknown)}" if unknown else "no output was asked for",
                expected=", ".join(self._outputs),
            )


def _nonfinite(name: str, array: Array, pixel_values: Images) -> ProgramError:
    axes = tuple(range(1, array.ndim))
    rows = np.flatnonzero(~np.isfinite(array).all(axis=axes))
    inputs = np.flatnonzero(~np.isfinite(pixel_values[rows]).all(axis=(1, 2, 3)))
    return ProgramError(
        f"the output {name} holds NaN or infinity",
        where=f"images {', '.join(map(str, rows[:10]))}{', …' if len(rows) > 10 else ''} of {len(array)}",
        expected="finite values",
        hint="pixel_values of these images hold NaN or infinity too"
        if len(inputs) == len(rows)
        else "check the program with npu-runtime verify",
    )
