from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from npu_export.timm_import import import_timm
from npu_runtime import UnavailableError
from npu_runtime.artifact.schema import Preprocessing
from npu_runtime.preprocess import preprocess, read_images

Array = npt.NDArray[np.float32]
PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data" / "photographs").glob("*.jpg"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAW = Preprocessing((32, 32), None, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "test")


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    """The class that Hugging Face names in vit-base's preprocessor_config.json, the one on pillow."""
    import_timm()
    try:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    except ImportError:
        from transformers import ViTImageProcessor as ViTImageProcessorPil
    return ViTImageProcessorPil


@pytest.fixture
def photograph() -> Image.Image:
    return Image.open(PHOTOGRAPHS[0]).convert("RGB").resize((60, 40))


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "image",
    [*PHOTOGRAPHS, (1, 1), (1, 300), (223, 225), (224, 224), (1000, 17), (31, 640)],
    ids=lambda image: image.name if isinstance(image, Path) else "x".join(map(str, image)),
)
def test_pixels_are_those_of_hugging_faces_processor(
    hugging_face: Any, image: Path | tuple[int, int], interpolation: Literal["bilinear", "bicubic"]
) -> None:
    opened = Image.open(image) if isinstance(image, Path) else noise(*image)
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    processor = hugging_face(
        size={"height": 224, "width": 192}, resample=resample, image_mean=list(MEAN), image_std=list(STD)
    )
    # Said, since transformers 4 guesses it from the sizes and takes one pixel for a channel.
    theirs = processor(opened, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    ours = preprocess(opened, Preprocessing((224, 192), None, interpolation, MEAN, STD, "test"))
    assert ours.shape == theirs.shape == (3, 224, 192)
    levels = np.abs(ours - theirs) * np.array(STD, np.float32).reshape(3, 1, 1) * 255
    assert levels.max() < 1e-3


def test_values_are_scaled_then_shifted_by_the_mean_and_divided_by_the_deviation() -> None:
    image = Image.new("RGB", (5, 5), (255, 0, 51))
    pixels = preprocess(image, dataclasses.replace(RAW, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0)))
    assert (pixels.dtype, pixels.shape, pixels.flags.c_contiguous) == (np.dtype(np.float32), (3, 32, 32), True)
    for channel, value in zip(pixels, (1.0, -0.5, 0.1)):
        np.testing.assert_allclose(channel, value, atol=1e-7)


def test_height_comes_before_width() -> None:
    assert preprocess(noise(8, 8), dataclasses.replace(RAW, size=(16, 48))).shape == (3, 16, 48)


def test_images_of_several_sizes_and_kinds_make_one_batch(photograph: Image.Image, tmp_path: Path) -> None:
    photograph.convert("L").save(tmp_path / "a.png")
    photograph.resize((7, 90)).save(tmp_path / "b.webp", lossless=True)
    batch = read_images([tmp_path / "a.png", str(tmp_path / "b.webp"), PHOTOGRAPHS[0]], RAW)
    assert (batch.shape, batch.dtype) == ((3, 3, 32, 32), np.dtype(np.float32))
    np.testing.assert_array_equal(batch[0], preprocess(photograph.convert("L"), RAW))
    np.testing.assert_array_equal(batch[2], preprocess(Image.open(PHOTOGRAPHS[0]), RAW))


def test_no_images_make_an_empty_batch() -> None:
    assert read_images([], RAW).shape == (0, 3, 32, 32)


def test_reading_images_without_pillow_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnavailableError, match="needs pillow"):
        read_images([PHOTOGRAPHS[0]], RAW)
