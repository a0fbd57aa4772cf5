"""Image files to `pixel_values`, from the manifest alone, with pillow and numpy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.schema import Preprocessing
from npu_runtime.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[np.float32]


def read_images(paths: Sequence[str | os.PathLike[str]], preprocessing: Preprocessing) -> Array:
    """`pixel_values`, float32 [N, 3, H, W], of image files.

    Raises InputError with the path of the first file that is missing or no image.
    """
    height, width = preprocessing.size
    pixel_values = np.empty((len(paths), 3, height, width), np.float32)
    for row, path in zip(pixel_values, paths):
        with _open_image(path) as image:
            row[:] = preprocess(image, preprocessing)
    return pixel_values


def read_upright(path: str | os.PathLike[str]) -> Image.Image:
    """An image file as RGB of 8 bits, upright by its EXIF orientation. Raises InputError as `read_images` does."""
    with _open_image(path) as image:
        return _to_upright_rgb(image)


@contextlib.contextmanager
def _open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An open image; what fails while it is used is an InputError with its path."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UnavailableError("reading images needs pillow", hint="pip install pillow") from error
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        raise InputError("this file is no image that pillow reads", where=path) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("the image cannot be read", where=path, got=error) from error


def image_suffixes() -> frozenset[str]:
    """How names of files end that pillow reads, in lower case with the dot."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UnavailableError("reading images needs pillow", hint="pip install pillow") from error
    Image.init()
    return frozenset(suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN)


def plan_resize(
    size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Width and height to resize an image of this width and height to, and the box to cut from the result.

    Rounded as torchvision's Resize and CenterCrop do (transforms/functional.py): the longer side down, the
    margin to the nearest even number.
    """
    height, width = preprocessing.size
    if preprocessing.shortest_edge is None:
        return (width, height), (0, 0, width, height)
    edge, shorter = preprocessing.shortest_edge, min(size)
    wide, high = (edge if side == shorter else edge * side // shorter for side in size)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    return (wide, high), (left, top, left + width, top + height)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Array:
    """One image as float32 [3, H, W].

    Upright by its EXIF orientation, as RGB, resized in 8 bits as Hugging Face's ViTImageProcessor and
    timm's transforms do, scaled to 0..1, then `(x - mean) / std`. Raises ValueError for more than 8 bits
    of grey, which pillow clips to white.
    """
    from PIL import Image

    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    upright = _to_upright_rgb(image)
    size, box = plan_resize(upright.size, preprocessing)
    resized = upright.resize(size, resample[preprocessing.interpolation]).crop(box)
    pixels = np.asarray(resized, np.float32) / np.float32(255)
    normalised = (pixels - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def denormalise(pixel_values: Array, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """The colours [H, W, 3] that `preprocess` made `pixel_values` [3, H, W] from; NaN and infinity are clipped."""
    channels = pixel_values.transpose(1, 2, 0)
    colours = channels * np.array(preprocessing.std, np.float32) + np.array(preprocessing.mean, np.float32)
    rounded: npt.NDArray[np.uint8] = np.rint(np.nan_to_num(colours).clip(0, 1) * 255).astype(np.uint8)
    return rounded


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":
        raise ValueError(f"pillow mode {upright.mode} has more than 8 bits a channel; scale it to 8 bits first")
    if upright.mode == "P":  # pillow warns of a palette with alpha that goes to RGB directly; the colours are the same
        upright = upright.convert("RGBA")
    return upright.convert("RGB")
