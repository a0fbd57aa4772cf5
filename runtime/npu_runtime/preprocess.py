"""Image files to `pixel_values`, from the manifest alone, with pillow and numpy.

Before normalisation the pixels are, bit for bit, those of the publisher's own pipeline on pillow with the settings that
the manifest records: timm's and torchvision's transforms, transformers' processors. Transformers' processors on
torchvision resize in PyTorch, whose filter weights have fewer bits than pillow's: 1 of 255 off here and there, 2 in
places. More on sharp noise in a bicubic resize, which is clipped to 0..255 after the first side, and pillow (13, at
least) does not always take the horizontal one first (tests/exporter/test_publishers.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.schema import InputDtype, Preprocessing, input_spec
from npu_runtime.artifact.store import Images
from npu_runtime.decode import read_upright, to_upright_rgb

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

MOST_PIXELS = 1 << 26
"""Of an enlarged image before the crop, 256 MiB in pillow: reached by images 250 times as long as wide, or more."""


def read_images(
    paths: Sequence[str | os.PathLike[str]], preprocessing: Preprocessing, dtype: InputDtype = "float32"
) -> Images:
    """`pixel_values` of image files: float32 [N, 3, H, W], or uint8 [N, H, W, 3].

    Raises InputError with the path of the first file that is missing or no image.
    """
    pixel_values = np.empty(input_spec(dtype, preprocessing.size).of_batch(len(paths)), dtype)
    for row, path in zip(pixel_values, paths):
        write_pixels(resize_and_crop(read_upright(path), preprocessing), preprocessing, out=row)
    return pixel_values


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Array:
    """One image as float32 [3, H, W]: upright by its EXIF orientation, as RGB, resized, cropped and normalised.

    Raises ValueError for a mode that has no known way to RGB.
    """
    pixel_values = np.empty((3, *preprocessing.size), np.float32)
    normalise(resize_and_crop(to_upright_rgb(image), preprocessing), preprocessing, out=pixel_values)
    return pixel_values


def plan_resize(
    size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Width and height to resize an image of this width and height to, and the box to cut from the result.

    Rounded as the publishers do: the longer side down; half of an odd margin to even in torchvision's CenterCrop,
    which timm and open_clip use (transforms/functional.py), and down in transformers (image_transforms.py).
    The shortest edge is never below the size, so that nothing has to be padded.
    """
    height, width = preprocessing.size
    if preprocessing.shortest_edge is None:
        return (width, height), (0, 0, width, height)
    edge, shorter = preprocessing.shortest_edge, min(size)
    wide, high = (edge if side == shorter else edge * side // shorter for side in size)
    down = preprocessing.crop_offset == "down"
    left, top = ((margin // 2 if down else round(margin / 2)) for margin in (wide - width, high - height))
    return (wide, high), (left, top, left + width, top + height)


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """The pixels uint8 [H, W, 3] of an RGB image that is upright, resized with antialiasing in 8 bits."""
    from PIL import Image

    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    kind = resample[preprocessing.interpolation]
    (wide, high), box = plan_resize(image.size, preprocessing)
    if wide * high > MOST_PIXELS > image.width * image.height:
        # 1 x 60,000 would become 224 x 13,440,000. Cut first, up to 2 of 255 are off: pillow's boxes are float32.
        across, down = image.width / wide, image.height / high
        source = (box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height))
        return np.asarray(image.resize((box[2] - box[0], box[3] - box[1]), kind, source))
    return np.asarray(image.resize((wide, high), kind).crop(box))


def write_pixels(pixels: Pixels, preprocessing: Preprocessing, *, out: Images) -> None:
    """Write pixels [H, W, 3] to `out` as they are where it is uint8, for programs that normalise; else normalised."""
    if out.dtype == np.uint8:
        out[...] = pixels
    else:
        normalise(pixels, preprocessing, out=cast(Array, out))


def normalise(pixels: Pixels, preprocessing: Preprocessing, *, out: Array) -> None:
    """Write pixels [H, W, 3] to `out` [3, H, W]: scaled to 0..1, minus the mean, divided by the deviation."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    for channel, mean, std in zip(range(3), preprocessing.mean, preprocessing.std):
        table = (levels - np.float32(mean)) / np.float32(std)
        np.take(table, pixels[..., channel], out=out[channel], mode="clip")  # which needs no buffer; bytes are inside


def denormalise(pixel_values: Images, preprocessing: Preprocessing) -> Pixels:
    """The colours [H, W, 3] that `write_pixels` made `pixel_values` of an image from; NaN and infinity are clipped."""
    if pixel_values.dtype == np.uint8:
        return cast(Pixels, pixel_values)
    channels = pixel_values.transpose(1, 2, 0)
    colours = channels * np.array(preprocessing.std, np.float32) + np.array(preprocessing.mean, np.float32)
    rounded: Pixels = np.rint(np.nan_to_num(colours).clip(0, 1) * 255).astype(np.uint8)
    return rounded
