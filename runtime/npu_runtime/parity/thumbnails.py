"""Small pictures of images that were run, so that a record shows them where the files are not."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_runtime.artifact.schema import Preprocessing
from npu_runtime.artifact.store import Images
from npu_runtime.decode import read_upright
from npu_runtime.preprocess import denormalise

if TYPE_CHECKING:
    from PIL import Image

MOST_THUMBNAILS = 12
"""Images of a run that have thumbnails, the first ones; each takes some 10 kB of a record."""
LONGEST_SIDE = 160
QUALITY = 80


@dataclass(frozen=True, slots=True)
class Thumbnails:
    """Both JPEG in base64, without metadata, the longer side at most LONGEST_SIDE pixels."""

    published: str
    """The file's image, upright."""
    preprocessed: str
    """`pixel_values` as colours: what the network is given, cut and resized."""
    width: int
    """Of the file's image, upright, in pixels."""
    height: int


def make_thumbnails(path: str | os.PathLike[str], pixel_values: Images, preprocessing: Preprocessing) -> Thumbnails:
    """Thumbnails of an image file and of its `pixel_values`; raises InputError where it cannot be read."""
    from PIL import Image

    published = read_upright(path)
    colours = Image.fromarray(denormalise(pixel_values, preprocessing))
    return Thumbnails(_encode(published), _encode(colours), *published.size)


def _encode(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    small.info.clear()  # a comment of the file would be written again
    data = io.BytesIO()
    small.save(data, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(data.getvalue()).decode("ascii")
