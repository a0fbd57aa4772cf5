"""What a service without this project needs of an artifact's manifest: a program, and images as it takes them.

Imported by the examples beside it; json, numpy and pillow are all it needs. `npu_runtime` does the same and more:
grey of 16 bits, images far longer than wide, checked hashes, errors that say which image is bad.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def read_program(artifact: Path, format: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest, and the program of a format with the largest batch."""
    manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
    return manifest, max((p for p in manifest["programs"] if p["format"] == format), key=lambda p: p["batch"])


def prepare_image(path: str, manifest: dict[str, Any]) -> Any:
    """An image file as one row of the input."""
    steps = manifest["preprocessing"]
    (height, width), edge = steps["size"], steps["shortest_edge"]
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    shorter = min(image.size)
    wide, high = (width, height) if edge is None else (edge * side // shorter for side in image.size)
    image = image.resize((wide, high), Image.Resampling[steps["interpolation"].upper()])
    halve = round if steps["crop_offset"] == "even" else int
    left, top = halve((wide - width) / 2), halve((high - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    if manifest["inputs"][0]["dtype"] == "uint8":
        return pixels  # [H, W, 3]: the program normalises
    mean, std = (np.array(steps[name], np.float32) for name in ("mean", "std"))
    return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)


def batches(paths: Sequence[str], batch: int, manifest: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """How many images are in each batch of the fixed size, and the batch, the last one padded with zeros."""
    for start in range(0, len(paths), batch):
        rows = [prepare_image(path, manifest) for path in paths[start : start + batch]]
        padding = [np.zeros_like(rows[0])] * (batch - len(rows))
        yield len(rows), np.ascontiguousarray(np.stack(rows + padding))
