"""Image files to upright RGB of 8 bits, with pillow.

What publishers' own loaders do with a file (transformers' `load_image`, the datasets of timm and torchvision:
`Image.open(file).convert("RGB")`) is done here, with these differences, each tested in tests/runtime/test_decode.py:

- an image is turned upright by its EXIF orientation, as `load_image` does; timm and torchvision leave it lying;
- grey of 16 bits is scaled to 8, where `convert` clips all but the darkest 1/256 of its range to white.

As in all of them, alpha is dropped and the colour beneath it shows, CMYK is converted by pillow's formula, a colour
profile (ICC) is not applied, and of an animation or of several pages the first frame is read. Hugging Face's CLIP
and BiT processors lay an image with alpha, given as such, on white; what their `load_image` gives them has none left.

JPEG's draft mode, which decodes at a half or less of the size, is not used: it is two to three times as fast on large
photographs, and up to 31 of 255 away from what publishers' pipelines give (scripts/benchmark_images.py).
"""

from __future__ import annotations

import io
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from npu_runtime.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from PIL import Image

_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation -> what turns it upright, by pillow's names; 1 is upright."""
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0112, 0x0102, 0x0106
"""Tags of EXIF and TIFF."""
_SCALED_TO_16_BITS = ("PNG", "PPM")
"""Formats whose grey of more than 8 bits pillow gives in mode I, from 0 to 65535, in some versions."""


def read_upright(path: str | os.PathLike[str], data: bytes | None = None) -> Image.Image:
    """An image file as RGB of 8 bits, upright by its EXIF orientation, whatever its name ends in.

    `data` is what the file holds where it was read already, as from a tar. Raises InputError with the path of a file
    that is missing, no image, damaged, or too large to be decoded: more pixels than pillow allows (twice
    `PIL.Image.MAX_IMAGE_PIXELS`; between that and once, pillow warns).
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UnavailableError("reading images needs pillow", hint="pip install pillow") from error
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            return to_upright_rgb(image)
    except UnidentifiedImageError:
        nbytes = os.path.getsize(path) if data is None else len(data)
        nothing = None if nbytes else "0 bytes"
        raise InputError("this file is no image that pillow reads", where=path, got=nothing) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            "the image cannot be read",
            where=path,
            got=error,
            hint="set PIL.Image.MAX_IMAGE_PIXELS if you trust it",
        ) from error
    except Exception as error:  # a damaged file makes pillow's plugins raise anything, from OSError to IndexError
        told = error if isinstance(error, (OSError, SyntaxError, ValueError)) and str(error) else repr(error)
        raise InputError("the image cannot be read", where=path, got=told) from error


def image_suffixes() -> frozenset[str]:
    """How names of files end that pillow reads, in lower case with the dot."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UnavailableError("reading images needs pillow", hint="pip install pillow") from error
    Image.init()
    return frozenset(suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN)


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB of 8 bits, upright; the image itself where it is that already.

    Raises ValueError for a mode without a known way to RGB, such as grey of 32 bits, whose range nothing tells.
    """
    from PIL import Image

    image.load()  # before the orientation is read: pillow turns TIFF upright when it decodes
    method = _UPRIGHT.get(_orientation(image))
    if image.mode[0] in "IF":
        rgb = _to_8_bits(image).convert("RGB")
    elif image.mode == "P":  # pillow warns of a palette with alpha that goes to RGB directly; the colours are the same
        rgb = image.convert("RGBA").convert("RGB")
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # which copies what is RGB already
    return rgb if method is None else rgb.transpose(Image.Transpose[method])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; upright for an EXIF block that cannot be read, which says nothing of the pixels."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits as its 8 highest, which is what pillow itself keeps of colours of 16 bits."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits, inverted = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == 0
    elif image.mode == "I" and image.format in _SCALED_TO_16_BITS:
        bits, inverted = 16, False
    else:
        raise ValueError(f"pillow mode {image.mode} is grey of 32 bits, of no known range; scale it to 8 or 16 bits")
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(~grey if inverted else grey)
