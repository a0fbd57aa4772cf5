from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from npu_export.timm_import import import_timm
from npu_runtime.artifact.schema import Preprocessing
from npu_runtime.preprocess import plan_resize, preprocess

RAW = Preprocessing((32, 32), None, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "test")
ONE = np.float32(1)
SIDE = st.integers(1, 300)


def cropping(size: tuple[int, int], edge: int) -> Preprocessing:
    return dataclasses.replace(RAW, size=size, shortest_edge=edge)


@pytest.fixture(scope="module")
def transforms() -> Any:
    """torchvision's own transforms, which timm and open_clip prepare images with."""
    import_timm()  # the first import of torchvision fails beside a CPU torch
    return pytest.importorskip("torchvision.transforms")


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def rows_and_columns(width: int, height: int) -> Image.Image:
    """An image whose pixels tell where they are."""
    y, x = np.indices((height, width))
    return Image.fromarray(np.stack([x % 256, y % 256, x // 256 + 16 * (y // 256)], -1).astype(np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("edge", [32, 33, 35, 39, 64])
@pytest.mark.parametrize(
    "image", [(1, 1), (1, 40), (40, 1), (7, 5), (31, 33), (32, 32), (223, 225), (640, 31), (17, 900), (333, 257)]
)
def test_pixels_are_those_of_torchvisions_resize_and_center_crop(
    transforms: Any, image: tuple[int, int], edge: int, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    opened = noise(*image)
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.CenterCrop(32)(transforms.Resize(edge, interpolation=mode)(opened))
    ours = preprocess(opened, dataclasses.replace(cropping((32, 32), edge), interpolation=interpolation))
    np.testing.assert_array_equal(ours, (np.asarray(theirs, np.float32) / np.float32(255)).transpose(2, 0, 1))


@given(width=SIDE, height=SIDE, edge=st.integers(1, 60), data=st.data())
def test_the_geometry_of_any_size_is_torchvisions(
    transforms: Any, width: int, height: int, edge: int, data: st.DataObject
) -> None:
    high, wide = data.draw(st.tuples(st.integers(1, edge), st.integers(1, edge)))
    nearest = transforms.InterpolationMode.NEAREST
    resized = transforms.Resize(edge, interpolation=nearest)(Image.new("1", (width, height)))
    size, box = plan_resize((width, height), cropping((high, wide), edge))
    assert size == resized.size
    painted = rows_and_columns(*size)
    theirs = transforms.CenterCrop((high, wide))(painted)
    np.testing.assert_array_equal(np.asarray(painted.crop(box)), np.asarray(theirs))


@pytest.mark.parametrize(
    ("image", "size", "edge", "resized", "box"),
    [
        ((640, 480), (224, 224), 256, (341, 256), (58, 16, 282, 240)),
        ((480, 640), (224, 224), 256, (256, 341), (16, 58, 240, 282)),
        ((500, 500), (224, 224), 248, (248, 248), (12, 12, 236, 236)),
        ((100, 60), (16, 48), 48, (80, 48), (16, 16, 64, 32)),
        ((60, 100), (16, 48), 48, (48, 80), (0, 32, 48, 48)),
        ((33, 32), (32, 32), 32, (33, 32), (0, 0, 32, 32)),
        ((35, 32), (32, 32), 32, (35, 32), (2, 0, 34, 32)),
        ((1, 1), (32, 32), 36, (36, 36), (2, 2, 34, 34)),
        ((1, 5), (32, 32), 32, (32, 160), (0, 64, 32, 96)),
        ((5, 1), (32, 32), 32, (160, 32), (64, 0, 96, 32)),
    ],
)
def test_the_shorter_side_becomes_the_edge_and_the_centre_is_cut_out(
    image: tuple[int, int],
    size: tuple[int, int],
    edge: int,
    resized: tuple[int, int],
    box: tuple[int, int, int, int],
) -> None:
    assert plan_resize(image, cropping(size, edge)) == (resized, box)


@given(width=SIDE, height=SIDE, high=st.integers(1, 60), wide=st.integers(1, 60), more=st.integers(0, 20))
def test_what_is_cut_out_has_the_size_and_lies_inside_the_resized_image(
    width: int, height: int, high: int, wide: int, more: int
) -> None:
    edge = max(high, wide) + more
    (resized_width, resized_height), (left, top, right, bottom) = plan_resize(
        (width, height), cropping((high, wide), edge)
    )
    assert min(resized_width, resized_height) == edge
    assert (right - left, bottom - top) == (wide, high)
    assert 0 <= left < right <= resized_width
    assert 0 <= top < bottom <= resized_height


@pytest.mark.parametrize("image", [(1, 1), (640, 480), (7, 900)])
def test_without_a_shortest_edge_the_whole_image_is_squashed(image: tuple[int, int]) -> None:
    assert plan_resize(image, dataclasses.replace(RAW, size=(16, 48))) == ((48, 16), (0, 0, 48, 16))


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_a_crop_shows_the_middle_alone_and_a_squash_shows_the_ends_too(turned: bool) -> None:
    flag = Image.new("RGB", (96, 32), (0, 255, 0))
    flag.paste((255, 0, 0), (0, 0, 32, 32))
    flag.paste((0, 0, 255), (64, 0, 96, 32))
    if turned:
        flag = flag.transpose(Image.Transpose.ROTATE_270)
    cut = preprocess(flag, cropping((32, 32), 32))
    assert (cut[1].min(), cut[0].max(), cut[2].max()) == (ONE, 0, 0)
    squashed = preprocess(flag, RAW)
    assert (squashed[0].max(), squashed[2].max()) == (ONE, ONE)


def test_an_image_is_turned_upright_before_its_shorter_side_is_measured() -> None:
    image = noise(50, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image.copy()
    turned.getexif().update(exif)
    steps = cropping((16, 32), 40)
    expected = preprocess(image.transpose(Image.Transpose.ROTATE_270), steps)
    np.testing.assert_array_equal(preprocess(turned, steps), expected)
    assert np.abs(expected - preprocess(image, steps)).max() > 0.1
