"""The examples of ways to deploy, each run as its docstring says, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npu_runtime
from npu_runtime.artifact.store import open_artifact

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"
PHOTOGRAPHS = Path(__file__).parent / "data" / "photographs"
ALONE = """
import runpy, sys
sys.modules["npu_runtime"] = sys.modules["npu_export"] = None  # an import of either fails
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(name: str, *arguments: str | Path) -> None:
    """An example, where this project's packages cannot be imported."""
    command = [sys.executable, "-c", ALONE, EXAMPLES / name, *arguments]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Five image files: photographs, one on its side, one with alpha, and one narrower than tall."""
    folder = tmp_path / "images"
    shutil.copytree(PHOTOGRAPHS, folder)
    photograph = Image.open(PHOTOGRAPHS / "coffee.jpg")
    photograph.resize((301, 77)).convert("RGBA").save(folder / "alpha.png")
    photograph.resize((33, 150)).save(folder / "narrow.png")
    lying = Image.Exif()
    lying[0x0112] = 6
    photograph.resize((97, 55)).save(folder / "lying.jpg", exif=lying)
    return sorted(str(path) for path in folder.iterdir())


@pytest.mark.parametrize("backend", ["onnxruntime", "torchscript"])
def test_an_engine_alone_gives_the_rows_of_embed(
    backend: str, tiny_artifact: Path, images: list[str], tmp_path: Path
) -> None:
    run_alone(f"embed_with_{backend}.py", tiny_artifact, tmp_path / "f.npy", *images)
    with npu_runtime.load(tiny_artifact, backend=backend, batches=[4]) as encoder:
        np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), encoder.embed(images))


def test_images_are_prepared_from_the_manifest_of_any_encoder(
    probed_artifact: Path, images: list[str], tmp_path: Path
) -> None:
    run_alone("embed_with_onnxruntime.py", probed_artifact, tmp_path / "f.npy", *images)
    with npu_runtime.load(probed_artifact) as encoder:
        np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), encoder.embed(images))


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    """Of a process that may start a Ray, which must leave no process; the folder's name is short for its sockets."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield {**os.environ, "RAY_TMPDIR": folder, "HOME": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        deadline = time.monotonic() + 30
        while (left := _processes_that_name(folder)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []


def _processes_that_name(text: str) -> list[str]:
    """Command lines of the processes that hold a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if text in line:
            found.append(line)
    return found


def embed_on_ray(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / "embed_on_ray.py", *arguments]
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=400)


def test_two_workers_of_ray_give_the_rows_names_and_bad_images_of_one_process(
    ray_environment: dict[str, str],
    tiny_artifact: Path,
    images: list[str],
    run_command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    folder = Path(images[0]).parent
    for index in range(12):
        Image.open(PHOTOGRAPHS / "chelsea.jpg").resize((60 + index, 50)).save(folder / f"small-{index}.png")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name in ("narrow.png", "lying.jpg"):
            tar.add(folder / name, f"in/{name}")
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "coffee.jpg").read_bytes()[:5000])
    (folder / os.fsdecode(b"bad\xff\n.jpg")).write_bytes(b"no image")
    output = tmp_path / "features.parquet"

    run = embed_on_ray(ray_environment, tiny_artifact, folder, "--output", output)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "images    23 found = 19 embedded + 4 bad\n"
    assert {path.name for path in tmp_path.iterdir()} == {"images", "features.parquet", "features.parquet.bad.jsonl"}

    one = run_command("npu-runtime", "embed", tiny_artifact, folder, "--output", tmp_path / "f.npy")
    assert one.returncode == 0, one.stderr
    import pyarrow.parquet as pq

    parts = sorted(output.iterdir())
    assert len(parts) == 2
    table = pq.read_table(output).sort_by("index")
    assert table["index"].to_pylist() == list(range(23))
    good = [row for row in table.to_pylist() if row["error"] is None]
    names = [json.loads(line) for line in (tmp_path / "f.npy.names.jsonl").read_bytes().splitlines()]
    assert [row["id"] for row in good] == names
    # A part may end with a smaller batch than one process runs there, which rounds otherwise.
    np.testing.assert_allclose([row["embedding"] for row in good], np.load(tmp_path / "f.npy"), atol=1e-5)
    bad = output.with_name("features.parquet.bad.jsonl").read_bytes()
    assert bad == (tmp_path / "f.npy.bad.jsonl").read_bytes()
    reasons = [row["error"] for row in table.to_pylist() if row["error"] is not None]
    assert reasons == [json.loads(line)["reason"] for line in bad.splitlines()]
    for part in parts:
        assert pq.read_schema(part).metadata[b"artifact_digest"].decode() == open_artifact(tiny_artifact).digest


def test_workers_of_a_ray_that_runs_compute_on_its_npus(
    ray_environment: dict[str, str],
    emulated_npu: Callable[..., dict[str, str]],
    tiny_artifact: Path,
    images: list[str],
    tmp_path: Path,
) -> None:
    log = tmp_path / "npu.log"
    environment = {**emulated_npu(), **ray_environment, "EMULATED_CANN_LOG": str(log)}
    del environment["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    folder, port = environment["RAY_TMPDIR"], str(_free_port())
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    start += [f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false", "--object-store-memory=100000000"]
    start += ["--num-cpus=2", '--resources={"NPU": 2}']
    with (tmp_path / "ray.log").open("w") as said:
        head = subprocess.Popen(start, env=environment, stdout=said, stderr=said)
    try:
        _wait_until(lambda: "Ray runtime started" in (tmp_path / "ray.log").read_text(), 120)
        output, options = tmp_path / "f.parquet", ("--address", f"127.0.0.1:{port}", "--device", "npu")
        run = embed_on_ray(environment, tiny_artifact, Path(images[0]).parent, "--output", output, *options)
    finally:
        head.terminate()
        head.wait(60)
    assert run.returncode == 0, run.stderr
    import pyarrow.parquet as pq

    rows = pq.read_table(output).sort_by("index").to_pylist()
    assert [row["id"] for row in rows] == images
    assert log.read_text().splitlines().count("aclInit") == 2  # in each of two processes
    with npu_runtime.load(tiny_artifact, backend="torchscript") as encoder:
        np.testing.assert_allclose([row["embedding"] for row in rows], encoder.embed(images), atol=1e-5)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait_until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("wrong", ["artifact", "output", "images"])
def test_what_cannot_be_done_is_refused_before_ray_starts(
    wrong: str, ray_environment: dict[str, str], tiny_artifact: Path, tmp_path: Path
) -> None:
    artifact, folder, output = tiny_artifact, PHOTOGRAPHS, tmp_path / "f.parquet"
    if wrong == "artifact":
        artifact = tmp_path
    elif wrong == "output":
        output.mkdir()
    else:
        folder = tmp_path
    run = embed_on_ray(ray_environment, artifact, folder, "--output", output)
    assert run.returncode == 1
    expected = {"artifact": "no artifact here", "output": "the output exists", "images": "there are no images"}
    assert expected[wrong] in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == ([output] if wrong == "output" else [])
