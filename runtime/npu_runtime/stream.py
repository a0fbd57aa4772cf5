"""Images in, features out, in their order: decoded by threads ahead of the device, a fixed number of them at a time.

Threads decode, not processes: pillow lets go of the interpreter while it decodes and resizes, and an image that another
process prepared would have to be copied from it. The device has a thread of its own, so that it runs one batch while
the next is collected and the caller uses the last.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from npu_runtime.errors import BadImage, InputError, UsageError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from npu_runtime.artifact.schema import Preprocessing, TensorSpec
    from npu_runtime.artifact.store import Images

Array = npt.NDArray[np.float32]
Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | torch.Tensor | InputError"
"""What `Encoder.stream` takes for an image: it says what each is."""
OnBad = Literal["raise", "give"]

QUEUED = 2
"""Batches that the device has: one runs, and one waits, so that it never does."""
MOST_BAD = 1000
"""Bad images that a batch may hold beside its good ones, so that a million of them do not wait for one that is good."""


Row: TypeAlias = "Array | BadImage"
Prepared: TypeAlias = "Images | BadImage"


class Stream(Iterator[Row]):
    """Rows in the order of their images; made by `Encoder.stream`. Threads may share it: each row is given once.

    It ends, and its threads with it, when the images do, when it raises, and when it or its encoder is closed.
    """

    def __init__(
        self,
        images: Iterable[Source],
        prepare: Callable[[Source, str], Images],
        run: Callable[[Images], Array],
        *,
        batch: int,
        workers: int,
        on_bad: OnBad,
    ) -> None:
        if workers < 1:
            raise UsageError("workers must be positive", expected="1 or more", got=workers)
        if on_bad not in get_args(OnBad):
            raise UsageError("unknown way with bad images", expected=" or ".join(get_args(OnBad)), got=repr(on_bad))
        self._prepare = prepare
        self._run = run
        self._batch = batch
        self._ahead = 2 * workers
        self._on_bad = on_bad
        self.most_in_flight = self._ahead + 1 + (QUEUED + 1) * batch
        """The most images that are decoded, or about to be, before their row is given."""
        self._decoders = ThreadPoolExecutor(workers, "npu-runtime-decode")
        self._device = ThreadPoolExecutor(1, "npu-runtime-device")
        self._lock = threading.Lock()
        self._closed = False
        self._batches: Generator[list[Row], None, None] = self._run_batches(images)
        self._rows: deque[Row] = deque()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Row:
        with self._lock:
            while not self._rows or self._closed:
                self._rows.extend(self._next_batch())
            row = self._rows.popleft()
        if isinstance(row, BadImage):
            self._refuse(row)
            return row
        return row.copy()  # which holds on to no other

    def batches(self) -> Iterator[list[Row]]:
        """Rows, a batch at a time. How long it is depends on its own images alone, not on those before it."""
        while True:
            with self._lock:
                try:
                    rows = self._next_batch()
                except StopIteration:
                    return
            for row in rows:
                if isinstance(row, BadImage):
                    self._refuse(row)
            yield rows

    def close(self) -> None:
        """End the threads, after what each of them does now; later rows are not to be had. May be called again."""
        self._closed = True
        for pool in (self._decoders, self._device):
            pool.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(ValueError):  # another thread waits for a row, and will find the stream closed
            self._batches.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse(self, bad: BadImage) -> None:
        if self._on_bad == "raise":
            self.close()
            raise bad.error

    def _next_batch(self) -> list[Row]:
        if self._closed:
            raise StopIteration
        try:
            return next(self._batches)
        except (CancelledError, RuntimeError) as error:
            if not self._closed:
                self.close()
                raise
            raise UsageError("the stream was closed while it ran", hint="close it when its rows are used") from error
        except BaseException:
            self.close()
            raise

    def _run_batches(self, images: Iterable[Source]) -> Generator[list[Row], None, None]:
        running: deque[tuple[list[BadImage | None], Future[Array]]] = deque()
        places: list[BadImage | None] = []
        good: list[Images] = []
        for row in self._prepared(images):
            if isinstance(row, BadImage):
                places.append(row)
            else:
                places.append(None)
                good.append(row)
            if len(good) == self._batch or len(places) - len(good) == MOST_BAD:
                running.append((places, self._device.submit(self._run_all, good)))
                places, good = [], []
            while len(running) == QUEUED or (running and running[0][1].done()):
                yield _in_places(*running.popleft())
        if places:
            running.append((places, self._device.submit(self._run_all, good)))
        while running:
            yield _in_places(*running.popleft())

    def _run_all(self, pixel_values: list[Images]) -> Array:
        if not pixel_values:
            return np.empty(0, np.float32)
        stacked = np.stack(pixel_values)
        pixel_values.clear()
        return self._run(stacked)

    def _prepared(self, images: Iterable[Source]) -> Iterator[Prepared]:
        """`pixel_values` of each image in order, while workers prepare those after it."""
        waiting: deque[tuple[Source, Future[Prepared]]] = deque()
        for index, image in enumerate(_one_by_one(images)):
            # Pillow reads a file when its image is first used, and two threads must not do so.
            wait([future for other, future in waiting if other is image])
            waiting.append((image, self._decoders.submit(self._prepare_one, index, image)))
            if len(waiting) > self._ahead:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()

    def _prepare_one(self, index: int, image: Source) -> Prepared:
        name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"
        try:
            if isinstance(image, InputError):
                raise image
            return self._prepare(image, name)
        except InputError as error:
            return BadImage(index, name, error)


def prepare(image: Source, name: str, spec: TensorSpec, preprocessing: Preprocessing) -> Images:
    """`pixel_values`, as the input has them, of one image, which messages call `name`.

    Those given as such, float32 [3, H, W], are only checked; an array of uint8 is a picture of any size.

    Raises InputError for what is no image, and for one of another shape or type.
    """
    from npu_runtime.decode import read_upright, to_upright_rgb
    from npu_runtime.preprocess import resize_and_crop, write_pixels

    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        return _check(image, name, spec)
    if isinstance(image, (str, os.PathLike)):
        upright = read_upright(image)
    elif isinstance(image, bytes):
        upright = read_upright(name, image)
    else:
        try:
            upright = to_upright_rgb(_picture(image) if isinstance(image, np.ndarray) else _require_image(image))
        except Exception as error:  # a damaged file, which pillow reads only now, makes it raise anything
            raise InputError("the image cannot be read", where=name, got=str(error) or repr(error)) from error
    pixel_values = np.empty(spec.of_batch(1)[1:], spec.dtype)
    write_pixels(resize_and_crop(upright, preprocessing), preprocessing, out=pixel_values)
    return pixel_values


def _check(pixel_values: npt.NDArray[Any], name: str, spec: TensorSpec) -> Array:
    shape = spec.of_batch(1)[1:]
    if spec.dtype == "uint8" or pixel_values.dtype != np.float32 or pixel_values.shape != shape:
        taken, hint = f"{spec.dtype} {list(shape)}, normalised, or a picture, uint8 [H, W, 3]", None
        if spec.dtype == "uint8":
            taken, hint = "a picture, uint8 [H, W, 3]", "do not normalise it: the programs of this artifact do"
        raise InputError(
            "an array is not what the encoder takes",
            where=name,
            expected=taken,
            got=f"{pixel_values.dtype} {list(pixel_values.shape)}",
            hint=hint,
        )
    return pixel_values


def _picture(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    from PIL import Image

    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"a picture is uint8 [H, W, 3], or [3, H, W] of torch; this is {list(pixels.shape)}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _require_image(image: object) -> Image.Image:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise ValueError(f"a {type(image).__name__} is no path, bytes, pillow image, array or tensor")
    return image


def _one_by_one(images: Iterable[Source]) -> Iterator[Source]:
    """Each image; arrays and tensors as arrays of this thread's own, which the caller may change, batches taken apart.

    A tensor's picture is [3, H, W], as torchvision reads it; it becomes [H, W, 3] here.
    """
    torch = sys.modules.get("torch")  # nobody who has not imported it has a tensor
    for image in images:
        array: Any = image
        if torch is not None and isinstance(image, torch.Tensor):
            array = image.detach().cpu().numpy()
            if array.dtype == np.uint8 and array.ndim in (3, 4):
                array = np.moveaxis(array, -3, -1)
        if not isinstance(array, np.ndarray):
            yield image
        elif array.ndim == 4:
            yield from (row.copy() for row in array)
        else:
            yield array.copy()


def _in_places(places: list[BadImage | None], future: Future[Array]) -> list[Row]:
    rows = iter(future.result())
    return [next(rows) if place is None else place for place in places]
