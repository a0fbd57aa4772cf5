from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npu_runtime.artifact.schema import Preprocessing, TensorSpec
from npu_runtime.parity.inputs import Inputs, image_inputs, seeded_inputs
from npu_runtime.parity.thumbnails import LONGEST_SIDE, MOST_THUMBNAILS, make_thumbnails
from npu_runtime.preprocess import denormalise, read_images

CLIP = Preprocessing((48, 64), None, "bicubic", (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "test")


def decode(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A picture of 300 x 200 that is red on the left and blue on the right, with a comment."""
    image = Image.new("RGB", (300, 200), (220, 30, 30))
    image.paste((20, 40, 210), (150, 0, 300, 200))
    image.save(tmp_path / "p.jpg", comment=b"private", quality=95)
    return tmp_path / "p.jpg"


def test_colours_come_back_from_pixel_values(photograph: Path) -> None:
    pixel_values = read_images([photograph], CLIP)[0]
    with Image.open(photograph) as image:
        resized = np.asarray(image.convert("RGB").resize((64, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(denormalise(pixel_values, CLIP), resized)


def test_values_that_are_no_colours_are_clipped() -> None:
    wild = np.array([np.nan, 1e30, -np.inf], np.float32)[:, None, None]
    assert denormalise(wild, CLIP).tolist() == [[[0, 255, 0]]]


def test_a_thumbnail_is_small_and_shows_the_image_without_its_metadata(photograph: Path) -> None:
    thumbnails = make_thumbnails(photograph, read_images([photograph], CLIP)[0], CLIP)
    published, preprocessed = decode(thumbnails.published), decode(thumbnails.preprocessed)
    assert (thumbnails.width, thumbnails.height) == (300, 200)
    assert (published.size, preprocessed.size) == ((LONGEST_SIDE, 107), (64, 48))
    for image in (published, preprocessed):
        red, blue = image.getpixel((5, 20)), image.getpixel((image.width - 5, 20))
        assert isinstance(red, tuple)
        assert isinstance(blue, tuple)
        assert (red[0] > 180, blue[2] > 180) == (True, True)
    assert b"private" not in base64.b64decode(thumbnails.published)
    assert len(thumbnails.published) < 20_000


def test_the_first_image_files_have_thumbnails_and_nothing_else_has(tmp_path: Path) -> None:
    for index in range(MOST_THUMBNAILS + 1):
        Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / f"{index:02}.png")
    (tmp_path / "00a.png").write_bytes(b"broken")
    spec = TensorSpec("pixel_values", "float32", ("B", 3, 48, 64))
    inputs = Inputs([*seeded_inputs((1,), spec), *image_inputs([tmp_path], CLIP)])
    having = [record.thumbnails is not None for record in inputs.records]
    assert having == [False, *[True] * MOST_THUMBNAILS, False]
    assert [Path(skipped.name).name for skipped in inputs.skipped] == ["00a.png"]
