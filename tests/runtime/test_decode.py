"""Every kind of file that people hold, against colours computed here without the code under test."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from npu_export.timm_import import import_timm
from npu_runtime import InputError
from npu_runtime.decode import image_suffixes, read_upright, to_upright_rgb

Pixels = npt.NDArray[np.uint8]
PHOTOGRAPH = Path(__file__).parents[1] / "data" / "photographs" / "chelsea.jpg"
ORIENTED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}
"""EXIF orientation -> upright pixels from stored ones, by what the standard says row 0 and column 0 are."""
TIFF_HEADERS = {"<": b"II*\0", ">": b"MM\0*"}


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    with Image.open(PHOTOGRAPH) as opened:
        return opened.convert("RGB").resize((60, 40))


def read(path: Path) -> Pixels:
    image = read_upright(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def make_png(header: bytes, data: bytes) -> bytes:
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def write_tiff(path: Path, pixels: bytes, *, bits: int, photometric: int, order: str = "<", width: int = 4) -> None:
    """Grey, uncompressed, one strip, 2 rows, as pillow cannot write it."""
    tags = {256: width, 257: 2, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 2, 279: len(pixels)}
    padded = pixels + b"\0" * (len(pixels) % 2)
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
    path.write_bytes(TIFF_HEADERS[order] + struct.pack(f"{order}I", 8 + len(padded)) + padded + directory)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_an_image_is_turned_upright_by_its_exif_orientation(
    photograph: Image.Image, tmp_path: Path, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    photograph.save(tmp_path / f"plain.{suffix}", **lossless)
    photograph.save(tmp_path / f"turned.{suffix}", exif=exif, **lossless)
    expected = ORIENTED[orientation](read(tmp_path / f"plain.{suffix}"))
    np.testing.assert_array_equal(read(tmp_path / f"turned.{suffix}"), expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_a_compressed_tiff_is_turned_upright_once(photograph: Image.Image, tmp_path: Path, compression: str) -> None:
    photograph.save(tmp_path / "turned.tiff", compression=compression, tiffinfo={274: 6})
    np.testing.assert_array_equal(read(tmp_path / "turned.tiff"), ORIENTED[6](np.asarray(photograph)))


@pytest.mark.parametrize("block", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_an_exif_block_that_cannot_be_read_leaves_the_image_as_it_is_stored(
    photograph: Image.Image, tmp_path: Path, block: bytes
) -> None:
    photograph.save(tmp_path / "plain.png")
    photograph.save(tmp_path / "broken.png", exif=block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow tells of it
        np.testing.assert_array_equal(read(tmp_path / "broken.png"), read(tmp_path / "plain.png"))


def test_an_image_in_memory_is_left_as_it_was(photograph: Image.Image) -> None:
    turned = photograph.copy()
    turned.getexif()[0x0112] = 6
    upright = to_upright_rgb(turned)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(photograph))
    np.testing.assert_array_equal(np.asarray(upright), ORIENTED[6](np.asarray(photograph)))


def test_grey_is_the_same_in_all_channels(photograph: Image.Image, tmp_path: Path) -> None:
    photograph.convert("L").save(tmp_path / "grey.png")
    expected = np.asarray(photograph.convert("L"))
    np.testing.assert_array_equal(read(tmp_path / "grey.png"), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "gif", "pbm"])
def test_one_bit_becomes_black_and_white(tmp_path: Path, suffix: str) -> None:
    bits = np.eye(9, dtype=bool)
    Image.fromarray(bits).save(tmp_path / f"bits.{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"bits.{suffix}")[..., 1], bits * np.uint8(255))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 160, 10))])
def test_a_palette_gives_its_colours_without_a_warning(
    photograph: Image.Image, tmp_path: Path, transparency: object
) -> None:
    palette = photograph.quantize(16)
    palette.save(tmp_path / "palette.png", **({} if transparency is None else {"transparency": transparency}))
    colours = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(read(tmp_path / "palette.png"), colours[np.asarray(palette)])


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "tga"])
def test_alpha_is_dropped_and_the_colour_beneath_it_shows(photograph: Image.Image, tmp_path: Path, suffix: str) -> None:
    with_alpha = photograph.copy()
    with_alpha.putalpha(Image.linear_gradient("L").resize(photograph.size))
    with_alpha.save(tmp_path / f"alpha.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read(tmp_path / f"alpha.{suffix}"), np.asarray(photograph))


def test_alpha_of_grey_is_dropped(photograph: Image.Image, tmp_path: Path) -> None:
    grey = photograph.convert("L")
    Image.merge("LA", (grey, Image.linear_gradient("L").resize(grey.size))).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read(tmp_path / "alpha.png")[..., 0], np.asarray(grey))


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk_becomes_rgb_as_light_that_the_inks_leave(tmp_path: Path, suffix: str) -> None:
    inks = np.array([[0, 255, 255, 0], [0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 128]], np.int32)
    image = Image.fromarray(np.repeat(inks.astype(np.uint8)[:, None], 64, 1).repeat(16, 0), "CMYK")
    image.save(tmp_path / f"inks.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    expected = np.rint((255 - inks[:, :3]) * (255 - inks[:, 3:]) / 255)
    assert np.abs(read(tmp_path / f"inks.{suffix}")[8::16, 8] - expected).max() <= (0 if suffix == "tiff" else 2)


def test_a_colour_profile_is_not_applied(photograph: Image.Image, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    photograph.save(tmp_path / "profile.png", icc_profile=profile)
    np.testing.assert_array_equal(read(tmp_path / "profile.png"), np.asarray(photograph))


DEEP = np.array([[0, 255, 256, 511], [32768, 40000, 65279, 65535]], np.uint16)


def test_grey_of_16_bits_keeps_the_8_highest_rather_than_being_clipped_to_white(tmp_path: Path) -> None:
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    Image.fromarray(DEEP).save(tmp_path / "deep.tiff")
    (tmp_path / "deep.pgm").write_bytes(b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes())
    for suffix in ("png", "tiff", "pgm"):
        got = read(tmp_path / f"deep.{suffix}")
        np.testing.assert_array_equal(got, np.stack([DEEP // 256] * 3, -1))
    with Image.open(tmp_path / "deep.png") as opened:
        assert np.asarray(opened.convert("RGB"))[0].max() == 255  # what every loader upstream makes of 256 / 65535


def test_grey_and_colours_of_16_bits_give_the_same_pixels(tmp_path: Path) -> None:
    def png(colour_type: int, samples: npt.NDArray[np.uint16]) -> bytes:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
        return make_png(struct.pack(">IIBBBBB", 4, 2, 16, colour_type, 0, 0, 0), zlib.compress(rows))

    (tmp_path / "grey.png").write_bytes(png(0, DEEP))
    (tmp_path / "rgb.png").write_bytes(png(2, np.stack([DEEP] * 3, -1)))
    (tmp_path / "grey-alpha.png").write_bytes(png(4, np.stack([DEEP, DEEP[::-1]], -1)))
    np.testing.assert_array_equal(read(tmp_path / "grey.png"), read(tmp_path / "rgb.png"))
    np.testing.assert_array_equal(read(tmp_path / "grey.png"), read(tmp_path / "grey-alpha.png"))


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_bytes_of_a_tiff_of_16_bits_may_be_in_either_order(tmp_path: Path, order: str) -> None:
    write_tiff(tmp_path / "deep.tiff", DEEP.astype(f"{order}u2").tobytes(), bits=16, photometric=1, order=order)
    np.testing.assert_array_equal(read(tmp_path / "deep.tiff")[..., 0], DEEP // 256)


def test_a_tiff_where_0_is_white_is_inverted(tmp_path: Path) -> None:
    write_tiff(tmp_path / "deep.tiff", DEEP.astype("<u2").tobytes(), bits=16, photometric=0)
    np.testing.assert_array_equal(read(tmp_path / "deep.tiff")[..., 0], 255 - DEEP // 256)


def test_a_tiff_of_12_bits_reaches_white(tmp_path: Path) -> None:
    values = [0x000, 0x010, 0x7FF, 0xFFF] * 2
    packed = int("".join(f"{value:03x}" for value in values), 16).to_bytes(12, "big")
    write_tiff(tmp_path / "deep.tiff", packed, bits=12, photometric=1)
    assert read(tmp_path / "deep.tiff")[0, :, 0].tolist() == [0, 1, 127, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_32_bits_is_refused_since_nothing_tells_its_range(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.linspace(0, 60000, 64).reshape(8, 8).astype(dtype)).save(path)
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_upright(path)
    assert caught.value.where == str(path)
    assert "32 bits, of no known range" in str(caught.value.got)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff", "mpo"])
def test_of_several_frames_the_first_is_read(photograph: Image.Image, tmp_path: Path, suffix: str) -> None:
    first, others = photograph, [Image.new("RGB", photograph.size, colour) for colour in ("red", "blue")]
    settings: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"frames.{suffix}", save_all=True, append_images=others, **settings)
    with Image.open(tmp_path / f"frames.{suffix}") as opened:
        assert opened.n_frames == 3
    lossy = {"gif": 40, "mpo": 60}.get(suffix, 0)
    difference = np.abs(read(tmp_path / f"frames.{suffix}").astype(int) - np.asarray(first))
    assert difference.mean() <= lossy / 8
    assert difference.max() <= lossy


def test_pixels_are_those_that_transformers_loads(photograph: Image.Image, tmp_path: Path) -> None:
    import_timm()
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 7
    photograph.save(tmp_path / "0.jpg", exif=exif)
    photograph.convert("CMYK").save(tmp_path / "1.jpg")
    photograph.quantize(16).save(tmp_path / "2.gif")
    photograph.convert("1").save(tmp_path / "3.png")
    photograph.convert("LA").save(tmp_path / "4.png")
    with_alpha = photograph.copy()
    with_alpha.putalpha(Image.linear_gradient("L").resize(photograph.size))
    with_alpha.save(tmp_path / "5.png")
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as opened:
            np.testing.assert_array_equal(read(path), np.asarray(load_image(opened)), path.name)


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_upright(path)
    assert caught.value.where == str(path)
    return caught.value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in str(refused(tmp_path / "absent.jpg").got)


def test_a_folder_is_named(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path).what


@pytest.mark.parametrize("data", [b"", b"\0", b"no image at all", b"%PDF-1.4"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(data)
    error = refused(tmp_path / "x.jpg")
    assert (error.what, error.got) == ("this file is no image that pillow reads", None if data else "0 bytes")


def test_what_a_name_ends_in_does_not_matter(photograph: Image.Image, tmp_path: Path) -> None:
    for name in ("png.jpg", "png.txt", "png"):
        photograph.save(tmp_path / name, "PNG")
        np.testing.assert_array_equal(read(tmp_path / name), np.asarray(photograph))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "bmp", "jp2", "tga", "ppm"])
def test_a_truncated_image_is_named(photograph: Image.Image, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    photograph.save(path)
    read(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refused(path).what.startswith(("the image cannot be read", "this file is no image"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "dds", "avif", "mpo"])
def test_whatever_bytes_are_damaged_an_image_comes_out_or_the_file_is_named(
    photograph: Image.Image, tmp_path: Path, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path, whole, chance = tmp_path / f"damaged.{suffix}", io.BytesIO(), random.Random(suffix)
    photograph.save(whole, Image.registered_extensions()[f".{suffix}"], exif=exif)
    named = 0
    for _ in range(150):
        data = bytearray(whole.getvalue())
        for _ in range(chance.choice((1, 2, 8))):
            data[chance.randrange(min(len(data), chance.choice((80, 400, 1 << 30))))] = chance.randrange(256)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pillow tells of damaged tags
            try:
                where = None if read(path).shape[2] == 3 else "no colours"
            except InputError as error:
                where, named = error.where, named + 1
        assert where in (None, str(path))
    assert named > 10


def test_a_decompression_bomb_is_named(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40)
    assert read(tmp_path / "bomb.png").shape == (40, 60, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 // 2 - 1)
    error = refused(tmp_path / "bomb.png")
    assert "decompression bomb" in str(error.got)
    assert "MAX_IMAGE_PIXELS" in str(error.hint)


def test_a_small_file_of_many_pixels_is_refused_before_they_are_decoded(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(make_png(header, zlib.compress(b"\0" * 7501)))
    assert "3600000000 pixels" in str(refused(tmp_path / "bomb.png").got)


def test_where_warnings_are_errors_a_large_image_is_named_too(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)
    assert "decompression bomb" in str(refused(tmp_path / "large.png").got)


def test_suffixes_are_those_of_formats_that_pillow_opens() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif"} <= image_suffixes()
    assert ".pdf" not in image_suffixes()
