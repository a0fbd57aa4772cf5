"""npu-runtime embed."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

import npu_runtime
from npu_runtime.artifact.store import open_artifact
from npu_runtime.bulk import formats

TINY = Path(__file__).parent.parent / "tiny.py"
SUFFIXES = [".npy", ".safetensors", ".parquet"]


@pytest.fixture
def images(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two image files in the working directory, which holds nothing else."""
    for name in ("chelsea.jpg", "coffee.jpg"):
        shutil.copy(photographs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return "chelsea.jpg", "coffee.jpg"


def read_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def read_names(output: Path) -> list[str]:
    """The names of an output's rows, in their order."""
    if output.suffix == ".npy":
        return read_lines(output.with_name(f"{output.name}.names.jsonl"))
    if output.suffix == ".safetensors":
        return [json.loads(line) for line in load_file(output)["names"].tobytes().splitlines()]
    import pyarrow.parquet as pq

    ids: list[str] = pq.read_table(output)["id"].to_pylist()
    return ids


def read_rows(output: Path) -> Any:
    if output.suffix == ".npy":
        return np.load(output)
    if output.suffix == ".safetensors":
        return load_file(output)["embedding"]
    import pyarrow.parquet as pq

    return np.stack(pq.read_table(output)["embedding"].to_numpy())


def others() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"chelsea.jpg", "coffee.jpg"}


def test_safetensors_hold_the_rows_of_embed_with_names_and_digest(
    call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    result = call("npu-runtime", "embed", tiny_artifact, *images)
    assert result.code == 0
    assert others() == {"features.safetensors"}
    with npu_runtime.load(tiny_artifact) as encoder:
        expected = encoder.embed(images)
    np.testing.assert_array_equal(load_file("features.safetensors")["embedding"], expected)
    with safe_open("features.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    opened = open_artifact(tiny_artifact)
    assert metadata == {
        "artifact_digest": opened.digest,
        "encoder": "tiny-vit",
        "weights": opened.manifest.weights_summary(),
    }
    assert read_names(Path("features.safetensors")) == list(images)
    assert result.out.splitlines()[0] == f"weights   {opened.manifest.weights_summary()}"
    assert result.out.splitlines()[-1] == "embedding float32 [2, 64] in features.safetensors"


def test_the_rows_are_in_the_order_given(
    call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    for name, order in (("ab.npy", images), ("ba.npy", images[::-1])):
        assert call("npu-runtime", "embed", tiny_artifact, *order, "--output", name).code == 0
    ab, ba = np.load("ab.npy"), np.load("ba.npy")
    np.testing.assert_allclose(ab, ba[::-1], atol=1e-5)
    assert np.abs(ab - ba).max() > 0.1


@pytest.mark.parametrize("backend", ["onnx", "torchscript", "eager"])
def test_npy_holds_the_rows_of_embed_by_the_backend_named(
    backend: str, call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    record = call(
        "npu-runtime", "embed", tiny_artifact, *images, "--output", "f.npy", "--backend", backend, "--json"
    ).json
    features = np.load("f.npy")
    assert (features.dtype, features.shape) == (np.float32, (2, 64))
    with npu_runtime.load(tiny_artifact, backend=backend) as encoder:
        np.testing.assert_array_equal(features, encoder.embed(images))
        assert record["backend"] == encoder.backend
    assert record["shape"] == [2, 64]
    assert record["counts"] == {"found": 2, "embedded": 2, "bad": 0, "resumed": 0}
    assert (record["names_file"], record["bad_file"]) == ("f.npy.names.jsonl", None)
    assert read_names(Path("f.npy")) == list(images)
    assert record["output"] == "f.npy"
    assert record["artifact_digest"] == open_artifact(tiny_artifact).digest
    assert others() == {"f.npy", "f.npy.names.jsonl"}


def test_an_output_that_exists_is_kept_without_force(
    call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    Path("f.npy").write_text("mine")
    refused = call("npu-runtime", "embed", tiny_artifact, *images, "--output", "f.npy", "--json")
    assert (refused.code, refused.json["error"]["what"]) == (2, "the output exists")
    assert "--force" in refused.json["error"]["next"]
    assert Path("f.npy").read_text() == "mine"
    assert call("npu-runtime", "embed", tiny_artifact, *images, "--output", "f.npy", "--force").code == 0
    assert np.load("f.npy").shape == (2, 64)


def test_an_unknown_suffix_is_refused(call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]) -> None:
    result = call("npu-runtime", "embed", tiny_artifact, *images, "--output", "f.csv", "--json")
    assert result.code == 2
    assert result.json["error"] == {
        "what": "unknown kind of output",
        "where": "f.csv",
        "expected": ".safetensors, .npy or .parquet",
        "got": ".csv",
    }
    assert others() == set()


def test_a_folder_that_does_not_exist_is_refused_before_the_artifact_is_opened(
    call: Callable[..., Any], images: tuple[str, str]
) -> None:
    result = call("npu-runtime", "embed", "no-artifact", *images, "--output", "no/f.npy", "--json")
    assert (result.code, result.json["error"]["where"]) == (2, "no")
    assert others() == set()


def test_missing_images_are_all_named_before_the_artifact_is_opened(
    call: Callable[..., Any], images: tuple[str, str]
) -> None:
    result = call("npu-runtime", "embed", "no-artifact", "x.jpg", *images, "y.jpg", "--json")
    assert (result.code, result.json["error"]["where"]) == (1, "x.jpg\ny.jpg")
    assert others() == set()


@pytest.mark.parametrize("damage", ["cut short", "no image"])
def test_an_image_that_cannot_be_read_is_listed_and_with_strict_leaves_no_output(
    damage: str, call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    data = Path(images[1]).read_bytes()
    Path(images[1]).write_bytes(data[: len(data) // 2] if damage == "cut short" else b"hello")
    result = call("npu-runtime", "embed", tiny_artifact, *images, "--strict", "--json")
    assert (result.code, result.json["error"]["where"]) == (1, "coffee.jpg")
    assert others() == set()
    record = call("npu-runtime", "embed", tiny_artifact, *images, "--json").json
    assert record["counts"] == {"found": 2, "embedded": 1, "bad": 1, "resumed": 0}
    assert record["bad_file"] == "features.safetensors.bad.jsonl"
    (bad,) = read_lines(Path(record["bad_file"]))
    assert bad["name"] == "coffee.jpg"
    assert ("truncated" if damage == "cut short" else "no image") in bad["reason"]
    assert read_names(Path("features.safetensors")) == ["chelsea.jpg"]
    Path(images[1]).write_bytes(data)
    whole = call("npu-runtime", "embed", tiny_artifact, *images, "--force")
    assert "2 found = 2 embedded + 0 bad" in whole.out
    assert others() == {"features.safetensors"}


def test_where_not_one_image_is_good_there_is_no_output(
    call: Callable[..., Any], tiny_artifact: Path, images: object
) -> None:
    Path("a.jpg").touch()
    Path("b.jpg").write_text("hello")
    result = call("npu-runtime", "embed", tiny_artifact, "a.jpg", "b.jpg", "--json")
    assert (result.code, result.json["error"]["what"]) == (1, "not one image could be read")
    assert result.json["error"]["where"] == "features.safetensors.bad.jsonl"
    assert others() == {"a.jpg", "b.jpg", "features.safetensors.bad.jsonl"}


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_that_the_system_refuses_is_one_clear_error_and_leaves_the_old_one(
    suffix: str,
    run_command: Callable[..., subprocess.CompletedProcess[str]],
    tiny_artifact: Path,
    images: tuple[str, str],
) -> None:
    output = Path(f"f{suffix}")
    output.write_text("old")

    def at_most(nbytes: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    arguments = ("npu-runtime", "embed", tiny_artifact, *images, "--output", output, "--force", "--json")
    refused = run_command(*arguments, preexec_fn=at_most(400))
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    error = json.loads(refused.stdout)["error"]
    assert (error["what"], error["where"]) == ("the disk takes no more bytes", str(output))
    assert (output.read_text(), others()) == ("old", {output.name})
    assert run_command(*arguments, preexec_fn=at_most(4000)).returncode == 0
    assert output.read_bytes() != b"old"
    assert others() == {output.name} | ({"f.npy.names.jsonl"} if suffix == ".npy" else set())


def contents(output: Path) -> dict[str, bytes]:
    """All files of an output, beside it too, by their names without its own."""
    files = [*output.parent.glob(f"{output.name}*"), *output.parent.glob(f"{output.name}/*")]
    root = str(output)
    return {str(file).removeprefix(root): file.read_bytes() for file in files if file.is_file()}


def jpeg(size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def broken(kind: int) -> bytes:
    """A file that is no whole image: empty, cut short, no image at all, or a bomb."""
    if kind == 3:
        bomb = Image.new("1", (30_000, 20_000))
        buffer = io.BytesIO()
        bomb.save(buffer, "png")
        return buffer.getvalue()
    return (b"", jpeg()[:300], b"<html>404</html>")[kind]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder `photos` in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.fixture
def slow_folder(folder: Path) -> Path:
    """160 files that take a process some seconds, a twentieth of them broken."""
    good = jpeg((1600, 1000))
    for index in range(160):
        (folder / f"{index:03}.jpg").write_bytes(broken(index // 20 % 3) if index % 20 == 7 else good)
    return folder


def interrupt(arguments: Iterable[str | Path], partial: Path, number: int, done: int) -> subprocess.Popen[str]:
    """A run that got a signal when it had journaled more than `done` images, and before its end."""
    process = subprocess.Popen(
        [sys.executable, str(TINY), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (partial / "journal.json").exists() and json.loads((partial / "journal.json").read_text())["done"] > done:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    return process


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_of_two_thousand_files_each_good_one_is_there_once_also_after_a_kill(
    suffix: str, call: Callable[..., Any], tiny_artifact: Path, folder: Path, photographs: Path
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    taken = [file.read_bytes() for file in sorted(photographs.glob("*.jpg"))]
    good = [*taken, jpeg((1600, 1000)), *(jpeg(seed=seed) for seed in range(9 - len(taken)))]
    bad = [broken(kind) for kind in range(4)]
    chosen = set(random.Random(0).sample(range(2000), 100))
    for index in range(2000):
        data = bad[index % 4] if index in chosen else good[index % 10]
        (folder / f"{index:04}.jpg").write_bytes(data)
    output = Path(f"f{suffix}")
    arguments = ("npu-runtime", "embed", tiny_artifact, "photos", "--workers", "1", "--resume", "--output", output)
    interrupt(arguments, Path(f".{output}.partial"), signal.SIGKILL, 0).communicate()
    record = call(*arguments, "--json").json
    resumed = record["counts"].pop("resumed")
    assert 0 < resumed < 2000
    assert record["counts"] == {"found": 2000, "embedded": 1900, "bad": 100}
    expected = [index for index in range(2000) if index not in chosen]
    assert read_names(output) == [f"photos/{index:04}.jpg" for index in expected]
    listed = read_lines(Path(record["bad_file"]))
    assert [line["name"] for line in listed] == [f"photos/{index:04}.jpg" for index in sorted(chosen)]
    assert len({line["reason"].partition(":")[0] for line in listed}) > 1
    with npu_runtime.load(tiny_artifact) as encoder:
        alone = encoder.embed(good)
    np.testing.assert_allclose(read_rows(output), alone[[index % 10 for index in expected]], atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_that_is_killed_twice_and_resumed_gives_the_file_of_one_run_bit_for_bit(
    suffix: str, call: Callable[..., Any], tiny_artifact: Path, slow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    arguments = ("npu-runtime", "embed", tiny_artifact, "photos", "--workers", "1", "--output")
    whole, output, partial = Path(f"whole{suffix}"), Path(f"f{suffix}"), Path(f".f{suffix}.partial")
    assert call(*arguments, whole).code == 0
    done = 0
    for _ in range(2):
        interrupt((*arguments, output, "--resume"), partial, signal.SIGKILL, done).communicate()
        assert not output.exists()
        done = json.loads((partial / "journal.json").read_text())["done"]
    refused = call(*arguments, output, "--json")
    assert (refused.code, "--resume" in refused.json["error"]["next"]) == (2, True)
    for file in ("data", "names.jsonl", "bad.jsonl"):  # written, and not yet journaled
        with (partial / file).open("ab") as torn:
            torn.write(b"torn")
    record = call(*arguments, output, "--resume", "--json").json
    assert record["counts"] == {"found": 160, "embedded": 152, "bad": 8, "resumed": done}
    assert 0 < done < 160
    assert contents(output) == contents(whole)
    assert not partial.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_130_and_keeps_its_rows(
    number: signal.Signals, call: Callable[..., Any], tiny_artifact: Path, slow_folder: Path
) -> None:
    arguments = ("npu-runtime", "embed", tiny_artifact, "photos", "--workers", "1", "--output", "f.npy")
    process = interrupt(arguments, Path(".f.npy.partial"), number, 0)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "--resume goes on with them" in told
    assert "Traceback" not in told
    assert call(*arguments, "--resume").code == 0
    assert len(np.load("f.npy")) == len(set(read_names(Path("f.npy")))) == 152


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_disk_that_fills_leaves_a_run_that_can_be_resumed(
    suffix: str,
    call: Callable[..., Any],
    run_command: Callable[..., subprocess.CompletedProcess[str]],
    tiny_artifact: Path,
    folder: Path,
) -> None:
    for index in range(200):
        (folder / f"{index:03}.jpg").write_bytes(jpeg(seed=index % 5) if index % 20 else b"")
    arguments = ("npu-runtime", "embed", tiny_artifact, "photos", "--output")
    output = Path(f"f{suffix}")
    full = run_command(
        *arguments, output, "--json", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    )
    assert full.returncode == 1
    error = json.loads(full.stdout)["error"]
    assert (error["what"], "--resume" in error["next"]) == ("the disk takes no more bytes", True)
    assert not output.exists()
    record = call(*arguments, output, "--resume", "--json").json
    assert record["counts"]["found"] == 200 == record["counts"]["embedded"] + record["counts"]["bad"]
    assert 50 < record["counts"]["resumed"] < 100
    whole = Path(f"whole{suffix}")
    assert call(*arguments, whole).code == 0
    assert contents(output) == contents(whole)


@pytest.fixture
def interrupted(call: Callable[..., Any], tiny_artifact: Path, folder: Path) -> tuple[str | Path, ...]:
    """A run of 21 images that stopped at the last, which is broken; and is mended now."""
    for index in range(20):
        (folder / f"{index:02}.jpg").write_bytes(jpeg(seed=index))
    (folder / "20.jpg").touch()
    arguments = ("npu-runtime", "embed", tiny_artifact, "photos", "--output", "f.npy")
    assert call(*arguments, "--strict").code == 1
    (folder / "20.jpg").write_bytes(jpeg(seed=20))
    return arguments


def test_a_strict_run_that_stopped_goes_on_where_the_image_was_mended(
    call: Callable[..., Any], interrupted: tuple[str | Path, ...]
) -> None:
    record = call(*interrupted, "--strict", "--resume", "--json").json
    assert record["counts"] == {"found": 21, "embedded": 21, "bad": 0, "resumed": 20}
    assert call(*interrupted[:-1], "whole.npy").code == 0
    assert contents(Path("f.npy")) == contents(Path("whole.npy"))


def test_force_begins_anew_where_a_run_was_interrupted(
    call: Callable[..., Any], interrupted: tuple[str | Path, ...]
) -> None:
    assert call(*interrupted, "--force", "--json").json["counts"]["resumed"] == 0
    assert others() == {"f.npy", "f.npy.names.jsonl", "photos"}


@pytest.mark.parametrize("change", ["list", "output", "artifact", "cut short"])
def test_a_run_that_was_another_or_lost_bytes_is_not_resumed(
    change: str,
    call: Callable[..., Any],
    interrupted: tuple[str | Path, ...],
    random_artifact: Path,
) -> None:
    arguments = list(interrupted)
    if change == "list":
        Path("photos/05b.jpg").write_bytes(jpeg())
    elif change == "output":
        arguments += ["--output-name", "tokens"]
    elif change == "artifact":
        arguments[2] = random_artifact
    else:
        os.truncate(".f.npy.partial/data", 1000)
    refused = call(*arguments, "--resume", "--json")
    assert refused.code == (1 if change == "cut short" else 2)
    assert "--force" in refused.json["error"]["next"]
    assert not Path("f.npy").exists()
    assert call(*arguments, "--force").code == 0


def test_a_run_that_another_process_writes_is_refused(
    call: Callable[..., Any], interrupted: tuple[str | Path, ...]
) -> None:
    import fcntl

    with Path(".f.npy.partial/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = call(*interrupted, "--resume", "--json")
    assert (refused.code, refused.json["error"]["what"]) == (2, "another run writes this output")


def test_tokens_are_written_on_request(call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str]) -> None:
    arguments = ("npu-runtime", "embed", tiny_artifact, *images, "--output", "f.npy", "--output-name")
    assert call(*arguments, "tokens", "--json").json["shape"] == [2, 17, 64]
    with npu_runtime.load(tiny_artifact) as encoder:
        np.testing.assert_array_equal(np.load("f.npy"), np.stack(list(encoder.stream(images, output="tokens"))))
    refused = call(*arguments, "logits", "--force", "--json")
    assert (refused.code, refused.json["error"]["expected"]) == (2, "embedding, tokens")


def test_parquet_is_a_folder_of_parts_with_id_embedding_and_digest(
    call: Callable[..., Any], tiny_artifact: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    monkeypatch.setattr("npu_runtime.bulk.partial.PART_NBYTES", 10 * 64 * 4)
    for index in range(30):
        (folder / f"{index:02}.jpg").write_bytes(jpeg(seed=index))
    assert call("npu-runtime", "embed", tiny_artifact, "photos", "--output", "f.parquet").code == 0
    parts = sorted(Path("f.parquet").iterdir())
    assert [len(pq.read_table(part)) for part in parts] == [12, 12, 6]
    table = pq.read_table("f.parquet")
    assert table.schema.field("embedding").type.equals(pa.list_(pa.float32(), 64))
    metadata = pq.read_schema(parts[0]).metadata
    assert metadata[b"artifact_digest"].decode() == open_artifact(tiny_artifact).digest
    assert table["id"].to_pylist() == [f"photos/{index:02}.jpg" for index in range(30)]
    with npu_runtime.load(tiny_artifact) as encoder:
        expected = encoder.embed(sorted(folder.iterdir()))
    np.testing.assert_array_equal(read_rows(Path("f.parquet")), expected)
    Path("f.parquet/mine.txt").touch()
    refused = call("npu-runtime", "embed", tiny_artifact, "photos", "--output", "f.parquet", "--force", "--json")
    assert (refused.code, refused.json["error"]["got"]) == (2, "mine.txt")


def test_without_pyarrow_parquet_is_refused_by_what_is_missing(
    call: Callable[..., Any], tiny_artifact: Path, images: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused = call("npu-runtime", "embed", tiny_artifact, *images, "--output", "f.parquet", "--json")
    assert (refused.code, refused.json["error"]["next"]) == (4, "pip install 'npu-export[parquet]'")


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_shards_are_read_in_order_without_being_extracted(
    suffix: str, call: Callable[..., Any], tiny_artifact: Path, folder: Path
) -> None:
    data = [jpeg(seed=seed) for seed in range(7)]
    for shard in range(2):
        with tarfile.open(folder / f"{shard}{suffix}", f"w:{suffix[5:]}") as archive:
            for index in range(7):
                key = f"train/{shard}-{6 - index}"
                add(archive, f"{key}.cls", b"3")
                add(archive, f"{key}.jpg", data[index] if index != 4 else b"")
                add(archive, f"{key}.json", b"{}")
    output = Path("f.npy")
    record = call("npu-runtime", "embed", tiny_artifact, "photos", "--output", output, "--json").json
    assert record["counts"] == {"found": 14, "embedded": 12, "bad": 2, "resumed": 0}
    good = [index for index in range(7) if index != 4]
    names = [f"photos/{shard}{suffix}/train/{shard}-{6 - index}.jpg" for shard in range(2) for index in good]
    assert read_names(output) == names
    with npu_runtime.load(tiny_artifact) as encoder:
        expected = encoder.embed([data[index] for index in good * 2])
    np.testing.assert_array_equal(np.load(output), expected)
    assert {path.name for path in folder.iterdir()} == {f"0{suffix}", f"1{suffix}"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_that_is_cut_short_gives_what_it_holds_and_is_listed(
    suffix: str, call: Callable[..., Any], tiny_artifact: Path, folder: Path
) -> None:
    file = folder / f"a{suffix}"
    with tarfile.open(file, f"w:{suffix[5:]}") as archive:
        for index in range(6):
            add(archive, f"{index}.jpg", jpeg((300, 200), seed=index))
    os.truncate(file, file.stat().st_size * 2 // 3)
    record = call("npu-runtime", "embed", tiny_artifact, file, "--output", "f.npy", "--json").json
    assert 1 <= record["counts"]["embedded"] <= 4
    assert record["counts"]["found"] == record["counts"]["embedded"] + record["counts"]["bad"]
    assert any("tar" in line["reason"] for line in read_lines(Path(record["bad_file"])))


def test_names_of_any_bytes_come_back_as_they_were(
    call: Callable[..., Any],
    run_command: Callable[..., subprocess.CompletedProcess[str]],
    tiny_artifact: Path,
    folder: Path,
) -> None:
    names = [b"a\nb.jpg", b"caf\xe9.jpg", "猫 \U0001f431.jpg".encode(), b'quote"\\.jpg', b"tab\t.jpg"]
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(jpeg())
    with open(os.path.join(os.fsencode(folder), b"bad\xff\n.jpg"), "wb"):
        pass
    expected = sorted(b"photos/" + name for name in names)
    assert call("npu-runtime", "embed", tiny_artifact, "photos", "--output", "f.npy").code == 0
    assert [os.fsencode(name) for name in read_names(Path("f.npy"))] == expected
    (bad,) = read_lines(Path("f.npy.bad.jsonl"))
    assert os.fsencode(bad["name"]) == b"photos/bad\xff\n.jpg"
    # The same by a list on stdin, in its order.
    done = subprocess.run(
        [sys.executable, str(TINY), "npu-runtime", "embed", str(tiny_artifact), "-", "-0", "--output", "g.npy"],
        input=b"\0".join(reversed(expected)),
        capture_output=True,
        check=True,
    )
    assert b"5 found = 5 embedded + 0 bad" in done.stdout
    assert [os.fsencode(name) for name in read_names(Path("g.npy"))] == expected[::-1]


def test_a_list_on_stdin_may_name_what_is_not_there(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tiny_artifact: Path, images: tuple[str, str]
) -> None:
    arguments = ("npu-runtime", "embed", tiny_artifact, "-", "--output", "f.npy", "--json")
    done = run_command(*arguments, input="coffee.jpg\n\nabsent.jpg\nchelsea.jpg")
    assert json.loads(done.stdout)["counts"] == {"found": 3, "embedded": 2, "bad": 1, "resumed": 0}
    assert read_names(Path("f.npy")) == ["coffee.jpg", "chelsea.jpg"]
    assert read_lines(Path("f.npy.bad.jsonl")) == [{"name": "absent.jpg", "reason": "No such file or directory"}]
    assert run_command(*arguments, "--force", input="").returncode == 1


def test_folders_globs_and_loops_give_each_image_once_in_order(
    call: Callable[..., Any], tiny_artifact: Path, folder: Path
) -> None:
    for name in ("b/2.jpg", "b/10.PNG", "a.jpg", "c.txt", "b/deep/1.jpeg", "z.gif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg())  # whatever its name says
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "y").symlink_to(folder / "b" / "deep")
    (folder / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(folder / "pipe.jpg")
    output = Path("f.npy")
    record = call("npu-runtime", "embed", tiny_artifact, "photos", "--output", output, "--json").json
    names = [f"photos/{name}" for name in ("a.jpg", "b/10.PNG", "b/2.jpg", "b/deep/1.jpeg", "z.gif")]
    assert read_names(output) == names
    bad = {line["name"]: line["reason"] for line in read_lines(Path(record["bad_file"]))}
    assert bad == {
        "photos/pipe.jpg": "this is neither a file nor a folder",
        "photos/self.jpg": "Too many levels of symbolic links",
    }
    assert call("npu-runtime", "embed", tiny_artifact, "photos/**/[ac1]*", "--output", output, "--force").code == 0
    matched = ["a.jpg", "b/10.PNG", "b/deep/1.jpeg", "c.txt"]
    assert [name for name in read_names(output) if "loop" not in name and "/y/" not in name] == [
        f"photos/{name}" for name in matched
    ]
    nothing = call("npu-runtime", "embed", tiny_artifact, "photos/*.webp", "--output", "g.npy", "--json")
    assert (nothing.code, nothing.json["error"]["where"]) == (1, "photos/*.webp")


def test_a_folder_that_cannot_be_listed_is_bad_and_does_not_stop_the_run(
    call: Callable[..., Any], tiny_artifact: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "closed").mkdir()
    (folder / "a.jpg").write_bytes(jpeg())
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # root may read any folder
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    record = call("npu-runtime", "embed", tiny_artifact, "photos", "--output", "f.npy", "--json").json
    assert record["counts"] == {"found": 2, "embedded": 1, "bad": 1, "resumed": 0}
    assert read_lines(Path(record["bad_file"])) == [{"name": "photos/closed", "reason": "Permission denied"}]


def test_a_folder_without_images_is_refused(call: Callable[..., Any], tiny_artifact: Path, folder: Path) -> None:
    result = call("npu-runtime", "embed", tiny_artifact, "photos", "--json")
    assert (result.code, result.json["error"]["what"]) == (1, "there are no images")
    assert {path.name for path in Path().iterdir()} == {"photos"}


def test_headers_are_as_long_for_any_count() -> None:
    rows = formats.Rows("embedding", (17, 1024), {"weights": "RANDOM"})
    for suffix, names in itertools.product((".npy", ".safetensors"), (0, 10**15)):
        assert len({len(formats.header(suffix, rows, count, names)) for count in (0, 1, 10**9, 10**15)}) == 1
    assert len(formats.header(".safetensors", rows, 0, 0)) == len(formats.header(".safetensors", rows, 9, 10**12))
