"""Images in, features out: kinds of images, their order, how many are in flight, and how a stream ends."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import npu_runtime
from npu_runtime import BadImage, InputError, UsageError
from npu_runtime.encoder import Encoder, load
from npu_runtime.preprocess import preprocess, read_images

PHOTOGRAPHS = sorted((Path(__file__).parent.parent / "data" / "photographs").glob("*.jpg"))


@pytest.fixture
def encoder(tiny_artifact: Path) -> Iterator[Encoder]:
    with load(tiny_artifact) as opened:
        yield opened


def pictures(count: int) -> list[np.ndarray[Any, Any]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 50, 3), np.uint8))


def threads_of_streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("npu-runtime-")]


def kinds_of(path: Path, encoder: Encoder) -> dict[str, Any]:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    pixels = np.asarray(image)
    pixel_values = preprocess(image, encoder.manifest.preprocessing)
    return {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "pillow": image,
        "unread pillow": Image.open(path),
        "picture": pixels,
        "picture of torch": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "pixel_values": pixel_values,
        "pixel_values of torch": torch.from_numpy(pixel_values).requires_grad_(),
    }


def test_every_kind_of_image_gives_the_row_of_the_file(encoder: Encoder) -> None:
    kinds = kinds_of(PHOTOGRAPHS[0], encoder)
    expected = encoder(read_images([PHOTOGRAPHS[0]] * 4, encoder.manifest.preprocessing))[0]
    for name, image in kinds.items():
        rows = list(encoder.stream([image] * 4))
        assert len(rows) == 4, name
        for row in rows:
            np.testing.assert_array_equal(row, expected, err_msg=name)
    kinds["unread pillow"].close()


def test_batches_of_arrays_and_tensors_count_as_their_images(encoder: Encoder) -> None:
    batch = np.stack(pictures(3))
    values = np.random.default_rng(1).standard_normal((5, 3, 32, 32)).astype(np.float32)
    expected = [*encoder.embed(list(batch)), *encoder(values), *encoder(values[:1])]
    given = [batch, torch.from_numpy(values), values[0], np.empty((0, 3, 32, 32), np.float32)]
    rows = list(encoder.stream(given))
    assert len(rows) == 9
    np.testing.assert_allclose(np.stack(rows), np.stack(expected), atol=1e-5)
    for array in (values, torch.from_numpy(values)):
        np.testing.assert_array_equal(encoder.embed(array), encoder(values))


def test_the_rows_of_embed_are_those_of_stream_in_the_order_of_the_images(encoder: Encoder) -> None:
    images = pictures(11)
    together = encoder.embed(images, workers=3)
    np.testing.assert_array_equal(np.stack(list(encoder.stream(images, workers=1))), together)
    alone = np.concatenate([encoder.embed([image]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together[:, None] - together[None]).max(axis=-1)[~np.eye(11, dtype=bool)].min() > 1e-3


def test_order_does_not_depend_on_how_long_an_image_takes(encoder: Encoder) -> None:
    sizes = [(2000, 1500) if index % 3 == 0 else (8, 8) for index in range(13)]
    images = [Image.new("RGB", size, (index * 19, 255 - index * 19, 7)) for index, size in enumerate(sizes)]
    expected = np.concatenate([encoder.embed([image]) for image in images])
    np.testing.assert_allclose(encoder.embed(images, workers=4), expected, atol=1e-5)


def test_another_output_is_streamed_by_its_name(encoder: Encoder) -> None:
    images = pictures(6)
    tokens = np.stack(list(encoder.stream(images, output="tokens")))
    assert tokens.shape == (6, 17, 64)
    with pytest.raises(UsageError, match="no output logits"):
        encoder.stream(images, output="logits")


def test_frozen_batches_are_filled_and_the_rest_is_run_with_the_least_padding(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run_batch = encoder._run_batch

    def counted(session: Any, pixel_values: Any, size: int, names: Any) -> Any:
        sizes.append(size)
        return run_batch(session, pixel_values, size, names)

    monkeypatch.setattr(encoder, "_run_batch", counted)
    images: list[Any] = pictures(10)
    images.insert(1, b"no image")
    assert len(list(encoder.stream(images, on_bad="give"))) == 11
    assert sizes == [4, 4, 1, 1]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_slow_consumer_holds_the_producer_back(encoder: Encoder, workers: int) -> None:
    pulled = 0
    image = pictures(1)[0]

    def endless() -> Iterator[Any]:
        nonlocal pulled
        while True:
            pulled += 1
            yield image

    with encoder.stream(endless(), workers=workers) as stream:
        most = 0
        for given, _ in enumerate(itertools.islice(stream, 40)):
            time.sleep(0.005)
            most = max(most, pulled - given)
    assert most <= stream.most_in_flight == 2 * workers + 1 + 3 * 4
    assert pulled <= 40 + stream.most_in_flight


def test_a_slow_decoder_is_waited_for_by_no_more_than_its_queue(encoder: Encoder) -> None:
    with encoder.stream(pictures(30), workers=2) as stream:
        next(stream)
        time.sleep(0.2)
        assert stream._decoders._work_queue.qsize() <= 2 * 2 + 1


def test_a_bad_image_raises_in_its_place(encoder: Encoder, tmp_path: Path) -> None:
    images = [*pictures(6), tmp_path / "absent.jpg", *pictures(3)]
    stream = encoder.stream(images)
    rows = list(itertools.islice(stream, 6))
    assert len(rows) == 6
    with pytest.raises(InputError) as caught:
        next(stream)
    assert caught.value.where == str(tmp_path / "absent.jpg")
    with pytest.raises(StopIteration):
        next(stream)
    assert threads_of_streams() == []


def test_bad_images_are_given_in_their_places_where_that_is_asked_for(encoder: Encoder, tmp_path: Path) -> None:
    good = pictures(5)
    (tmp_path / "empty.jpg").touch()
    bad: dict[int, Any] = {
        0: tmp_path / "empty.jpg",
        2: b"no image",
        3: np.zeros((3, 32, 32), np.float64),
        6: Image.new("F", (4, 4)),
        7: 12,
        8: InputError("the shard ends here", where="a.tar"),
    }
    images = iter(good)
    mixed = [bad[index] if index in bad else next(images) for index in range(len(bad) + len(good))]
    rows = list(encoder.stream(mixed, on_bad="give"))
    given = {row.index: row for row in rows if isinstance(row, BadImage)}
    assert list(given) == list(bad)
    assert [rows[index] for index in bad] == list(given.values())
    assert given[0].name == str(tmp_path / "empty.jpg")
    assert (given[0].error.got, given[2].error.where) == ("0 bytes", "image 2")
    assert "float64 [3, 32, 32]" in str(given[3].error)
    assert "32 bits" in str(given[6].error)
    assert "a int is no path" in str(given[7].error)
    assert given[8].error.what == "the shard ends here"
    np.testing.assert_array_equal(np.stack([row for row in rows if not isinstance(row, BadImage)]), encoder.embed(good))


def test_thousands_of_bad_images_are_given_before_a_good_one_comes(encoder: Encoder) -> None:
    pulled = 0

    def mostly_bad() -> Iterator[Any]:
        nonlocal pulled
        yield pictures(1)[0]
        for _ in range(5000):
            pulled += 1
            yield b""

    stream = encoder.stream(mostly_bad(), on_bad="give")
    assert not isinstance(next(stream), BadImage)
    assert pulled < 4000
    assert sum(isinstance(row, BadImage) for row in stream) == 5000


def test_closing_a_stream_ends_its_threads_and_its_rows(encoder: Encoder) -> None:
    stream = encoder.stream(itertools.repeat(pictures(1)[0]))
    next(stream)
    assert threads_of_streams() != []
    stream.close()
    stream.close()
    assert threads_of_streams() == []
    assert list(stream) == []


def test_leaving_the_encoder_ends_the_threads_of_its_streams(tiny_artifact: Path) -> None:
    with load(tiny_artifact) as encoder:
        streams = [encoder.stream(itertools.repeat(pictures(1)[0])) for _ in range(2)]
        for stream in streams:
            next(stream)
    assert threads_of_streams() == []
    with pytest.raises(UsageError, match="closed"):
        encoder.stream([])


def test_a_stream_that_another_thread_closes_raises_in_the_one_that_waits(encoder: Encoder) -> None:
    entered, released = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def held() -> Iterator[Any]:
        yield from pictures(4)
        entered.set()
        released.wait(30)
        yield from pictures(4)

    def consume() -> None:
        try:
            list(stream)
        except BaseException as error:
            raised.append(error)

    stream = encoder.stream(held())
    thread = threading.Thread(target=consume)
    thread.start()
    assert entered.wait(30)
    stream.close()
    released.set()
    thread.join(30)
    assert [type(error) for error in raised] == [UsageError]
    assert threads_of_streams() == []


def test_an_error_of_the_iterable_passes_and_ends_the_threads(encoder: Encoder) -> None:
    def failing() -> Iterator[Any]:
        yield from pictures(9)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(encoder.stream(failing()))
    assert threads_of_streams() == []


def test_an_error_of_the_program_passes_and_ends_the_threads(encoder: Encoder) -> None:
    with pytest.raises(npu_runtime.ProgramError, match="NaN"):
        list(encoder.stream(np.full((9, 3, 32, 32), np.nan, np.float32)))
    assert threads_of_streams() == []


def test_threads_share_an_encoder_with_a_stream_each(encoder: Encoder) -> None:
    images = pictures(12)
    expected = encoder.embed(images)
    got: dict[int, Any] = {}

    def consume(number: int) -> None:
        got[number] = np.stack(list(encoder.stream(images)))

    threads = [threading.Thread(target=consume, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_array_equal(got[number], expected)


def test_threads_that_share_a_stream_get_each_row_once(encoder: Encoder) -> None:
    images = pictures(30)
    expected = encoder.embed(images)
    stream = encoder.stream(images)
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.extend(stream)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = np.lexsort(np.stack(got).T), np.lexsort(expected.T)
    np.testing.assert_array_equal(np.stack(got)[order[0]], expected[order[1]])


def test_an_array_may_be_changed_once_it_was_taken(encoder: Encoder) -> None:
    images = pictures(9)
    buffer = np.empty_like(images[0])

    def reused() -> Iterator[Any]:
        for image in images:
            buffer[...] = image
            yield buffer

    np.testing.assert_array_equal(np.stack(list(encoder.stream(reused()))), encoder.embed(images))


def test_a_row_holds_on_to_no_other(encoder: Encoder) -> None:
    for row in encoder.stream(pictures(5)):
        assert isinstance(row, np.ndarray)
        assert row.base is None
        assert row.flags.writeable


def test_wrong_options_are_refused(encoder: Encoder) -> None:
    with pytest.raises(UsageError, match="workers must be positive"):
        encoder.stream([], workers=0)
    with pytest.raises(UsageError, match="raise or give"):
        encoder.stream([], on_bad="skip")  # type: ignore[arg-type]
    for one in ("a.jpg", b"bytes", Image.new("RGB", (4, 4))):
        with pytest.raises(InputError, match="images is one"):
            encoder.stream(one)


def test_bytes_that_are_cut_short_say_so(encoder: Encoder) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(buffer, "png")
    (row,) = encoder.stream([buffer.getvalue()[:-100]], on_bad="give")
    assert isinstance(row, BadImage)
    assert (row.error.what, row.error.where) == ("the image cannot be read", "image 0")
