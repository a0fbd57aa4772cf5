from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch

import npu_runtime
from npu_runtime import ArtifactError, Encoder, InputError, ProgramError, UsageError, load
from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.artifact.store import Artifact, open_artifact

Array = npt.NDArray[np.float32]
PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data" / "photographs").glob("*.jpg"))
BACKENDS = ("onnxruntime", "torchscript")
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module", params=BACKENDS)
def encoder(tiny_artifact: Path, request: pytest.FixtureRequest) -> Iterator[Encoder]:
    with load(tiny_artifact, backend=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def eager(tiny_artifact: Path) -> Iterator[Encoder]:
    with load(tiny_artifact, backend="eager") as opened:
        yield opened


@pytest.fixture
def nan_artifact(
    artifact_copy: Path,
    write_root_graph: Callable[..., None],
    record_again: Callable[[Path], Artifact],
) -> Artifact:
    """An artifact whose ONNX programs give NaN for images of negative sum."""
    for batch in (1, 4):
        write_root_graph(artifact_copy / f"model.b{batch}.onnx", batch)
    return record_again(artifact_copy)


@pytest.mark.parametrize("count", range(10))
def test_any_number_of_images_gives_what_each_gives_alone_and_what_eager_gives(
    encoder: Encoder, eager: Encoder, images: Array, count: int
) -> None:
    outputs = encoder.run(images[:count])
    reference = eager.run(images[:count])
    assert list(outputs) == ["embedding", "tokens"]
    for name, array in outputs.items():
        alone = [encoder.run(image[None])[name] for image in images[:count]]
        assert array.shape == encoder._outputs[name].of_batch(count)
        assert array.dtype == np.float32
        if count:
            np.testing.assert_allclose(array, np.concatenate(alone), **CLOSE)
        np.testing.assert_allclose(array, reference[name], **CLOSE)


def test_calling_gives_the_first_output(encoder: Encoder, images: Array) -> None:
    np.testing.assert_array_equal(encoder(images), encoder.run(images)["embedding"])


def test_only_the_outputs_asked_for_are_returned_in_the_order_asked(encoder: Encoder, images: Array) -> None:
    every = encoder.run(images[:5])
    assert list(encoder.run(images[:5], ("tokens",))) == ["tokens"]
    reverse = encoder.run(images[:5], ["tokens", "embedding"])
    assert list(reverse) == ["tokens", "embedding"]
    for name, array in reverse.items():
        np.testing.assert_array_equal(array, every[name])


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.filterwarnings("error")
def test_layout_and_ownership_of_the_input_do_not_matter(encoder: Encoder, images: Array, count: int) -> None:
    expected = encoder(images[:count])
    channels_last = np.ascontiguousarray(images[:count].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    strided = np.repeat(images[:count], 2, axis=0)[::2]
    read_only = images[:count].copy()
    read_only.flags.writeable = False
    mapped = np.frombuffer(images[:count].tobytes(), np.float32).reshape(count, 3, 32, 32)
    assert not channels_last.flags.c_contiguous
    for pixel_values in (channels_last, strided, read_only, mapped):
        np.testing.assert_array_equal(encoder(pixel_values), expected)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_input_is_left_as_it_was(encoder: Encoder, images: Array, count: int) -> None:
    before = images.copy()
    outputs = encoder.run(images[:count])
    for array in outputs.values():
        array[:] = -1
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_results_belong_to_the_caller(encoder: Encoder, images: Array, count: int) -> None:
    outputs = encoder.run(images[:count])
    kept = {name: array.copy() for name, array in outputs.items()}
    for array in outputs.values():
        assert array.flags.writeable
        assert array.flags.c_contiguous
        array[:] = np.nan
    again = encoder.run(images[:count])
    for name, array in again.items():
        np.testing.assert_array_equal(array, kept[name])
    encoder.run(images[::-1][:count].copy())
    for name, array in again.items():
        np.testing.assert_array_equal(array, kept[name])


@pytest.mark.parametrize("count", [1, 4, 5])
def test_an_embedding_does_not_hold_the_memory_of_all_tokens(encoder: Encoder, images: Array, count: int) -> None:
    embedding = encoder(images[:count])
    base = embedding.base
    assert getattr(base, "nbytes", embedding.nbytes) == embedding.nbytes
    if isinstance(base, torch.Tensor):
        assert base.untyped_storage().nbytes() == embedding.nbytes


@pytest.mark.parametrize(
    ("pixel_values", "what", "got"),
    [
        (np.zeros((1, 3, 32, 32)), "another dtype", "float64 [1, 3, 32, 32]"),
        (np.zeros((1, 3, 32, 32), np.float16), "another dtype", "float16 [1, 3, 32, 32]"),
        (np.zeros((1, 3, 32, 32), np.uint8), "another dtype", "uint8 [1, 3, 32, 32]"),
        (np.zeros((1, 3, 32, 32), ">f4"), "another dtype", ">f4 [1, 3, 32, 32]"),
        (np.zeros((3, 32, 32), np.float32), "another shape", "float32 [3, 32, 32]"),
        (np.zeros((1, 3, 32), np.float32), "another shape", "float32 [1, 3, 32]"),
        (np.zeros((1, 3, 32, 33), np.float32), "another shape", "float32 [1, 3, 32, 33]"),
        (np.zeros((1, 32, 32, 3), np.float32), "another shape", "float32 [1, 32, 32, 3]"),
        (np.zeros((0, 3, 16, 16), np.float32), "another shape", "float32 [0, 3, 16, 16]"),
        (np.zeros((1, 1, 3, 32, 32), np.float32), "another shape", "float32 [1, 1, 3, 32, 32]"),
        (np.zeros((), np.float32), "another shape", "float32 []"),
        ([[[[0.0]]]], "no array", "list"),
        (torch.zeros(1, 3, 32, 32), "no array", "Tensor"),
        (None, "no array", "NoneType"),
    ],
)
def test_another_input_is_refused_with_what_was_expected_and_got(
    encoder: Encoder, pixel_values: Any, what: str, got: str
) -> None:
    with pytest.raises(InputError, match=what) as caught:
        encoder(pixel_values)
    assert caught.value.expected == "numpy float32 [N, 3, 32, 32]"
    assert str(caught.value.got).replace("dtype('", "").replace("')", "") == got


def test_a_single_image_without_batch_is_told_how_to_add_it(encoder: Encoder) -> None:
    with pytest.raises(InputError) as caught:
        encoder(np.zeros((3, 32, 32), np.float32))
    assert "array[None]" in str(caught.value.hint)


def test_an_unknown_output_is_refused(encoder: Encoder, images: Array) -> None:
    with pytest.raises(UsageError, match="no output logits") as caught:
        encoder.run(images, ("embedding", "logits"))
    assert caught.value.expected == "embedding, tokens"


def test_asking_for_no_output_is_refused(encoder: Encoder, images: Array) -> None:
    with pytest.raises(UsageError, match="no output was asked for"):
        encoder.run(images, ())


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_of_the_frozen_batch_sizes_can_be_kept_to(tiny_artifact: Path, images: Array, backend: str) -> None:
    with load(tiny_artifact, backend=backend) as both, load(tiny_artifact, backend=backend, batches=[4, 4]) as four:
        assert (both.batches, four.batches) == ((1, 4), (4,))
        np.testing.assert_allclose(four(images), both(images), **CLOSE)


@pytest.mark.parametrize(("batches", "got"), [((2,), "2"), ((1, 8), "1, 8"), ((), "none"), ((0,), "0")])
def test_a_batch_size_that_was_not_frozen_is_refused(tiny_artifact: Path, batches: tuple[int, ...], got: str) -> None:
    with pytest.raises(UsageError, match="not frozen for this batch size") as caught:
        load(tiny_artifact, batches=batches)
    assert (caught.value.expected, caught.value.got) == ("1, 4", got)


def test_an_unknown_backend_is_refused_with_the_choices(tiny_artifact: Path) -> None:
    with pytest.raises(UsageError, match="unknown backend 'tensorrt'") as caught:
        load(tiny_artifact, backend="tensorrt")
    assert {"onnxruntime", "torchscript", "eager"} <= set(str(caught.value.expected).split(", "))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "npu:", "npu:x", "npu:-1", "", "CPU", "cuda:0 ", "npu:0\n"])
def test_an_unknown_device_is_wrong_usage(tiny_artifact: Path, device: str) -> None:
    with pytest.raises(UsageError, match="unknown device") as caught:
        load(tiny_artifact, device=device)
    assert caught.value.exit_code == 2
    assert caught.value.got == repr(device)


@pytest.mark.parametrize("threads", [0, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_less_than_one_thread_is_refused(tiny_artifact: Path, backend: str, threads: int) -> None:
    with pytest.raises(UsageError, match="threads must be positive"):
        load(tiny_artifact, backend=backend, threads=threads)


def test_threads_are_those_of_torch(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    load(tiny_artifact, backend="torchscript").close()
    assert asked == []
    load(tiny_artifact, backend="torchscript", threads=3).close()
    assert asked == [3]


def test_threads_are_those_of_onnxruntime(tiny_artifact: Path, images: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = onnxruntime.InferenceSession

    def session(path: str, options: onnxruntime.SessionOptions, **rest: Any) -> onnxruntime.InferenceSession:
        asked.append(options.intra_op_num_threads)
        return real(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    for threads in (None, 1):
        with load(tiny_artifact, backend="onnxruntime", threads=threads) as encoder:
            encoder(images[:1])
    assert asked == [0, 1]


def test_the_stages_of_a_call_on_the_cpu_are_one(encoder: Encoder, images: Array) -> None:
    assert encoder.time_stages(images[:1]) is None
    with pytest.raises(UsageError, match="the stages of one program") as refused:
        encoder.time_stages(images[:3])
    assert (refused.value.expected, refused.value.got) == ("as many images as 1, 4", "3")
    with pytest.raises(InputError, match="another dtype"):
        encoder.time_stages(images[:1].astype(np.float64))  # type: ignore[arg-type]


def test_a_closed_encoder_does_not_run(tiny_artifact: Path, images: Array) -> None:
    for backend in (*BACKENDS, "eager"):
        encoder = load(tiny_artifact, backend=backend)
        encoder(images[:1])
        encoder.close()
        encoder.close()
        for count in (0, 1):
            with pytest.raises(UsageError, match="the encoder is closed"):
                encoder(images[:count])


def test_leaving_the_block_closes_the_encoder_also_on_an_error(tiny_artifact: Path, images: Array) -> None:
    with pytest.raises(InputError), load(tiny_artifact) as encoder:
        encoder(images[0])
    with pytest.raises(UsageError, match="the encoder is closed"):
        encoder(images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_may_share_an_encoder_from_its_first_run(tiny_artifact: Path, images: Array, backend: str) -> None:
    with load(tiny_artifact, backend=backend) as encoder:
        expected = {count: load(tiny_artifact, backend=backend)(images[:count]) for count in range(1, 10)}
        ready = threading.Barrier(12)
        wrong: list[object] = []

        def work(seed: int) -> None:
            ready.wait()
            for count in np.random.default_rng(seed).integers(1, 10, 25):
                try:
                    np.testing.assert_allclose(encoder(images[:count]), expected[count], **CLOSE)
                except Exception as error:
                    wrong.append(error)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_named(encoder: Encoder, images: Array, value: float) -> None:
    images[[2, 6], 0, 0, 0] = value
    with pytest.raises(ProgramError, match="NaN or infinity") as caught:
        encoder(images)
    assert caught.value.where == "images 2, 6 of 9"
    assert "pixel_values of these images hold NaN" in str(caught.value.hint)


def test_an_image_that_is_not_finite_leaves_the_others_as_they_were(encoder: Encoder, images: Array) -> None:
    expected = encoder(images)
    images[6] = np.nan
    embedding = encoder.run(images, ("embedding",), allow_nonfinite=True)["embedding"]
    assert np.isnan(embedding[6]).all()
    rest = np.arange(9) != 6
    np.testing.assert_allclose(embedding[rest], expected[rest], **CLOSE)


def test_a_program_that_gives_nan_for_good_images_is_blamed_itself(nan_artifact: Artifact) -> None:
    pixel_values = np.full((6, 3, 32, 32), 1e-3, np.float32)
    with load(nan_artifact) as encoder:
        assert np.isfinite(encoder(pixel_values)).all()
        pixel_values[[1, 5]] *= -1
        with pytest.raises(ProgramError, match="the output embedding holds NaN") as caught:
            encoder(pixel_values)
        counted = encoder.run(pixel_values, allow_nonfinite=True)["tokens"]
    assert caught.value.where == "images 1, 5 of 6"
    assert caught.value.hint == "check the program with npu-runtime verify"
    assert np.flatnonzero(np.isnan(counted).any(axis=(1, 2))).tolist() == [1, 5]


def test_of_many_images_the_first_ten_are_named(nan_artifact: Artifact) -> None:
    with load(nan_artifact) as encoder, pytest.raises(ProgramError) as caught:
        encoder(np.full((12, 3, 32, 32), -1, np.float32))
    assert caught.value.where == "images 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … of 12"


def test_padding_rows_do_not_count_as_results(nan_artifact: Artifact) -> None:
    with load(nan_artifact, batches=[4]) as encoder:
        assert encoder(np.ones((1, 3, 32, 32), np.float32)).shape == (1, 64)


def test_the_default_backend_on_the_cpu_is_onnxruntime(tiny_artifact: Path) -> None:
    with load(tiny_artifact) as encoder:
        assert (encoder.backend, str(encoder.device)) == ("onnxruntime", "cpu")


def keep_format(document: dict[str, Any], format: str) -> None:
    document["programs"] = [program for program in document["programs"] if program["format"] == format]


def test_the_default_backend_without_onnx_is_torchscript(
    artifact_copy: Path, edit_manifest: Callable[..., None], images: Array
) -> None:
    edit_manifest(artifact_copy, lambda document: keep_format(document, "torchscript"))
    with load(artifact_copy) as encoder:
        assert encoder.backend == "torchscript"
        assert encoder(images).shape == (9, 64)


def test_a_backend_whose_format_the_artifact_lacks_is_refused(
    artifact_copy: Path, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(artifact_copy, lambda document: keep_format(document, "onnx"))
    with pytest.raises(UsageError, match="no program for the backend torchscript") as caught:
        load(artifact_copy, backend="torchscript")
    assert (caught.value.expected, caught.value.got) == ("onnx", "torchscript")


def test_an_artifact_of_unknown_formats_alone_is_refused(
    artifact_copy: Path, edit_manifest: Callable[..., None]
) -> None:
    def change(document: dict[str, Any]) -> None:
        for program in document["programs"]:
            program["format"] = "om"

    edit_manifest(artifact_copy, change)
    with pytest.raises(ArtifactError, match="no program that this version can open") as caught:
        load(artifact_copy)
    assert caught.value.got == "om"


@pytest.mark.parametrize(("backend", "opened"), [("onnxruntime", "weights.onnx.data"), ("torchscript", "model.ts")])
def test_the_files_that_a_backend_opens_are_hashed_first_and_no_others(
    artifact_copy: Path, images: Array, backend: str, opened: str
) -> None:
    for path in artifact_copy.iterdir():
        if path.name not in (MANIFEST_NAME, opened) and not (backend == "onnxruntime" and path.suffix == ".onnx"):
            path.write_bytes(b"changed")
    with load(artifact_copy, backend=backend) as encoder:
        assert encoder(images).shape == (9, 64)
    data = bytearray((artifact_copy / opened).read_bytes())
    data[-1] ^= 1
    (artifact_copy / opened).write_bytes(data)
    with pytest.raises(ArtifactError, match="has changed"):
        load(artifact_copy, backend=backend)


def test_an_opened_artifact_and_its_path_as_text_are_loaded_alike(tiny_artifact: Path, images: Array) -> None:
    artifact = open_artifact(tiny_artifact)
    with load(artifact) as first, load(str(tiny_artifact)) as second:
        assert first.artifact is artifact
        assert first.manifest == second.manifest
        np.testing.assert_array_equal(first(images), second(images))


def test_image_files_are_embedded_in_their_order_over_several_reads(encoder: Encoder) -> None:
    first, second = PHOTOGRAPHS[:2]
    alone = {path: encoder.embed([path])[0] for path in (first, second)}
    assert np.abs(alone[first] - alone[second]).max() > 0.01
    order = [first, second, second, first, second, first]
    embedding = encoder.embed(str(path) for path in order)
    np.testing.assert_allclose(embedding, np.stack([alone[path] for path in order]), **CLOSE)


def test_no_image_files_give_no_embeddings(encoder: Encoder) -> None:
    assert encoder.embed([]).shape == (0, 64)


def test_an_image_file_that_cannot_be_read_is_named(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(npu_runtime.InputError) as caught:
        encoder.embed([PHOTOGRAPHS[0], tmp_path / "absent.jpg"])
    assert caught.value.where == str(tmp_path / "absent.jpg")
