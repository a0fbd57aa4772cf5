"""Decoding and resizing JPEG photographs beside timm's transform, round by round in one run, one worker each.

`.venv/bin/python scripts/benchmark_images.py --output build/images.json` times each encoder's preparation of images
as timm has it, at about 1 and 4 megapixels, by npu_runtime and by timm on pillow. A ratio above 1 means that
npu_runtime prepares more images a second. It also prepares them with JPEG's draft mode, which decodes at half, a
quarter or an eighth of the size, to show what that would gain and by how much it would change the pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from npu_export.encoders import ENCODERS
from npu_export.encoders.spec import EncoderSpec
from npu_export.timm_import import import_timm
from npu_runtime.artifact.schema import Preprocessing
from npu_runtime.environment import describe_environment
from npu_runtime.preprocess import read_images

PHOTOGRAPH = Path(__file__).parents[1] / "tests" / "data" / "photographs" / "coffee.jpg"
SIZES = ((1200, 900), (2304, 1728))
GRAIN = 6
"""Levels of noise, so that an enlarged photograph takes as long to decode as one of that size."""


def write_photograph(path: Path, size: tuple[int, int]) -> None:
    with Image.open(PHOTOGRAPH) as opened:
        pixels = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = np.random.default_rng(0).integers(-GRAIN, GRAIN + 1, pixels.shape)
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=92)


def measure(encoder: EncoderSpec, path: Path, rounds: int) -> dict[str, Any]:
    steps = next(steps for steps in encoder.preprocessing if steps.publisher == "timm")
    ways = {"npu_runtime": lambda: read_images([path], steps)[0], **timm_ways(steps, path)}
    pixels = {name: np.asarray(way()) for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            ways[name]()
            samples[name].append((time.perf_counter() - start) * 1e3)
    std = np.array(steps.std, np.float32).reshape(3, 1, 1)
    levels = {name: np.abs(pixels[name] - pixels["timm"]) * std * 255 for name in ways}
    return {
        "encoder": encoder.name,
        "rate_of_timm": {
            name: statistics.median(t / own for t, own in zip(samples["timm"], samples[name])) for name in ways
        },
        "median_ms": {name: statistics.median(values) for name, values in samples.items()},
        "largest_difference_of_255": {name: float(values.max()) for name, values in levels.items()},
        "samples_ms": samples,
    }


def timm_ways(steps: Preprocessing, path: Path) -> dict[str, Callable[[], Any]]:
    transform = import_timm().data.create_transform(
        steps.size[0],
        interpolation=steps.interpolation,
        mean=steps.mean,
        std=steps.std,
        crop_pct=steps.size[0] / ((steps.shortest_edge or steps.size[0]) + 0.5),  # which timm rounds down
    )

    def plain() -> Any:
        with Image.open(path) as opened:
            return transform(opened.convert("RGB"))

    def draft() -> Any:
        with Image.open(path) as opened:
            opened.draft("RGB", (transform.transforms[0].size,) * 2)
            return transform(opened.convert("RGB"))

    return {"timm": plain, "timm, draft": draft}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, required=True, help="the record, JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            path = Path(folder) / f"{size[0]}.jpg"
            write_photograph(path, size)
            for encoder in ENCODERS:
                row = {"width": size[0], "height": size[1], **measure(encoder, path, options.rounds)}
                rows.append(row)
                for name, rate in row["rate_of_timm"].items():
                    print(
                        f"{encoder.name:<24}{size[0]} x {size[1]}  {name:<12}{row['median_ms'][name]:7.1f} ms  "
                        f"{rate:5.2f} x timm's rate, up to {row['largest_difference_of_255'][name]:.0f} of 255 apart"
                    )
                sys.stdout.flush()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": describe_environment(), "rounds": options.rounds, "rows": rows}
    options.output.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
