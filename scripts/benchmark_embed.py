"""`npu-runtime embed` of photographs beside the same encoder on arrays in memory, round by round in one run.

`.venv/bin/python scripts/benchmark_embed.py build/demo/vit-base-fp32 --output build/embed.json` embeds a folder of JPEG
photographs of 1 to 4 megapixels as the command does, lists, journal and output included, and as many prepared arrays
that lie in memory, in batches of the largest frozen size. A ratio of 1 means that decoding, resizing and writing cost
no time. The encoder has all cores but one, which is left for decoding, on both sides. Then the command runs in
processes of its own for a quarter of the images, in whole batches as all of them should be, and for all, and their
peaks of memory are compared: a rest would need a program of a smaller batch, and ONNX Runtime keeps weights for each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_images import write_photograph

from npu_runtime import Encoder, load
from npu_runtime.bulk.formats import Rows
from npu_runtime.bulk.partial import open_partial
from npu_runtime.bulk.run import embed_list, write_list
from npu_runtime.bulk.sources import find_images
from npu_runtime.devices.cores import cpu_count
from npu_runtime.environment import describe_environment
from npu_runtime.preprocess import read_images

SIZES = ((1200, 900), (1000, 1500), (1920, 1080), (1440, 1920), (2304, 1728))
"""Of the photographs, 1.1 to 4 megapixels; every fifth file is a link to the same."""
COMMAND = "from npu_runtime.cli import main; main()"
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
# Linux counts what a process was forked from in the peak of its children, and the benchmark itself grows large.


def write_folder(folder: Path, photographs: list[Path], count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        os.link(photographs[index % len(photographs)], folder / f"{index:06}.jpg")
    return folder


def embed_folder(encoder: Encoder, folder: Path, output: Path, workers: int) -> None:
    spec = encoder.manifest.outputs[0]
    rows = Rows(spec.name, tuple(spec.of_batch(0)[1:]), {"artifact_digest": encoder.artifact.digest})
    with open_partial(output, resume=False, force=True) as partial:
        listed = write_list(partial, find_images([str(folder)]))
        partial.begin(rows, {"list_sha256": listed.sha256})
        counts = embed_list(encoder, partial, workers=workers)
    assert counts.embedded == counts.found


def measure_rate(encoder: Encoder, folder: Path, photographs: list[Path], options: argparse.Namespace) -> Any:
    batch = max(encoder.batches)
    paths = [photographs[index % len(photographs)] for index in range(batch)]
    arrays = read_images(paths, encoder.manifest.preprocessing)
    output = folder.with_suffix(".npy")

    def from_memory() -> None:
        for start in range(0, options.images, batch):
            encoder(arrays[: min(batch, options.images - start)])

    ways = {"embed": lambda: embed_folder(encoder, folder, output, options.workers), "arrays": from_memory}
    encoder(arrays)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(options.rounds):
        for name in list(ways)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            ways[name]()
            samples[name].append(time.perf_counter() - start)
        print(f"round {index + 1}: {samples['arrays'][-1] / samples['embed'][-1]:.3f}", file=sys.stderr)
    ratios = [arrays_s / embed_s for arrays_s, embed_s in zip(samples["arrays"], samples["embed"])]
    np.testing.assert_allclose(np.load(output)[:batch], encoder(arrays)[: len(np.load(output))], atol=1e-3)
    return {
        "rate_of_arrays": statistics.median(ratios),
        "images_per_second": {name: options.images / statistics.median(values) for name, values in samples.items()},
        "samples_s": samples,
    }


def measure_peak(folder: Path, options: argparse.Namespace) -> int:
    """Bytes that the command had in memory at most."""
    command = [sys.executable, "-c", COMMAND, "embed", options.artifact, folder, "--quiet", "--force"]
    command += ["--output", folder.with_suffix(".npy"), "--threads", options.threads, "--workers", options.workers]
    launched = [sys.executable, "-c", LAUNCH, *map(str, command)]
    return int(subprocess.run(launched, check=True, stdout=subprocess.PIPE, text=True).stdout) * 1024


def main() -> None:
    cores = cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=max(1, cores - 1), help="of the encoder")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode")
    parser.add_argument("--output", type=Path, required=True, help="the record, JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        photographs = [Path(scratch) / f"{width}.jpg" for width, _ in SIZES]
        for path, size in zip(photographs, SIZES):
            write_photograph(path, size)
        folder = write_folder(Path(scratch) / "all", photographs, options.images)
        with load(options.artifact, threads=options.threads) as encoder:
            rate = measure_rate(encoder, folder, photographs, options)
            largest = max(encoder.batches)
        few = max(largest, options.images // 4 // largest * largest)
        quarter = write_folder(Path(scratch) / "quarter", photographs, few)
        peaks = {part.name: measure_peak(part, options) for part in (quarter, folder)}
    for name, per_second in rate["images_per_second"].items():
        print(f"{name:<8}{per_second:8.2f} images/s")
    print(f"embed runs at {rate['rate_of_arrays']:.3f} of the rate of arrays in memory")
    for name, nbytes in peaks.items():
        print(f"peak memory of the command, {name:<8}{nbytes / 1e6:8.1f} MB")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    described = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    record = {"environment": describe_environment(), **described, **rate, "peak_nbytes": peaks}
    options.output.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
