from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from npu_export.timm_import import import_timm
from npu_runtime import InputError, UnavailableError
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_by_its_exif_orientation(
    photograph: Image.Image, tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    turned = photograph.copy()
    turned.getexif()[0x0112] = undo
    ImageOps.exif_transpose(turned).save(path, exif=exif)
    np.testing.assert_array_equal(read_images([path], RAW)[0], preprocess(photograph, RAW))


def test_grey_is_the_same_in_all_channels(photograph: Image.Image) -> None:
    grey = preprocess(photograph.convert("L"), RAW)
    assert grey.shape == (3, 32, 32)
    np.testing.assert_array_equal(grey[0], grey[1])
    np.testing.assert_array_equal(grey[0], grey[2])


def test_a_palette_gives_its_colours(photograph: Image.Image) -> None:
    palette = photograph.quantize(16)
    np.testing.assert_array_equal(preprocess(palette, RAW), preprocess(palette.convert("RGB"), RAW))


def test_a_palette_with_transparency_gives_its_colours_without_a_warning(
    photograph: Image.Image, tmp_path: Path
) -> None:
    palette = photograph.quantize(16)
    palette.save(tmp_path / "alpha.png", transparency=bytes(range(0, 160, 10)))
    with Image.open(tmp_path / "alpha.png") as saved:
        assert isinstance(saved.info["transparency"], bytes)
    np.testing.assert_array_equal(read_images([tmp_path / "alpha.png"], RAW)[0], preprocess(palette, RAW))


def test_alpha_is_dropped(photograph: Image.Image) -> None:
    with_alpha = photograph.copy()
    with_alpha.putalpha(Image.linear_gradient("L").resize(photograph.size))
    np.testing.assert_array_equal(preprocess(with_alpha, RAW), preprocess(photograph, RAW))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.tiff")
    red = read_images([tmp_path / "red.tiff"], RAW)[0]
    np.testing.assert_array_equal(red, np.broadcast_to(np.array([1, 0, 0]).reshape(3, 1, 1), (3, 32, 32)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_refused_rather_than_clipped_to_white(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.linspace(0, 60000, 64).reshape(8, 8).astype(dtype)).save(path)
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_images([path], RAW)
    assert caught.value.where == str(path)
    assert "more than 8 bits" in str(caught.value.got)


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_up_to_eight_bits_of_grey_are_read(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "grey.tiff"
    Image.fromarray(np.eye(8, dtype=np.uint8).astype(dtype) * dtype(1)).save(path)
    assert read_images([path], RAW).max() > 0


def test_images_of_several_sizes_and_kinds_make_one_batch(photograph: Image.Image, tmp_path: Path) -> None:
    photograph.convert("L").save(tmp_path / "a.png")
    photograph.resize((7, 90)).save(tmp_path / "b.webp", lossless=True)
    batch = read_images([tmp_path / "a.png", str(tmp_path / "b.webp"), PHOTOGRAPHS[0]], RAW)
    assert (batch.shape, batch.dtype) == ((3, 3, 32, 32), np.dtype(np.float32))
    np.testing.assert_array_equal(batch[0], preprocess(photograph.convert("L"), RAW))
    np.testing.assert_array_equal(batch[2], preprocess(Image.open(PHOTOGRAPHS[0]), RAW))


def test_no_images_make_an_empty_batch() -> None:
    assert read_images([], RAW).shape == (0, 3, 32, 32)


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_images([PHOTOGRAPHS[0], path], RAW)
    assert caught.value.where == str(path)
    return caught.value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in str(refused(tmp_path / "absent.jpg").got)


def test_a_folder_is_named(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path).what


@pytest.mark.parametrize("data", [b"", b"\0", b"no image at all", b"%PDF-1.4"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(data)
    assert refused(tmp_path / "x.jpg").what == "this file is no image that pillow reads"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
def test_a_truncated_image_is_named(photograph: Image.Image, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    photograph.save(path)
    read_images([path], RAW)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refused(path).what.startswith(("the image cannot be read", "this file is no image"))


def test_a_decompression_bomb_is_named(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40)
    assert read_images([tmp_path / "bomb.png"], RAW).shape == (1, 3, 32, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 // 2 - 1)
    with pytest.raises(InputError) as caught:
        read_images([tmp_path / "bomb.png"], RAW)
    assert caught.value.where == str(tmp_path / "bomb.png")
    assert "decompression bomb" in str(caught.value.got)


def test_reading_images_without_pillow_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnavailableError, match="needs pillow"):
        read_images([PHOTOGRAPHS[0]], RAW)
