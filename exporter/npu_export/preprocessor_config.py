"""Hugging Face's preprocessor_config.json as `Preprocessing`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from npu_export.checkpoint import PREPROCESSOR_FILE, Checkpoint
from npu_export.errors import CheckpointError
from npu_runtime.artifact.schema import Preprocessing

_REFUSED = ("do_center_crop", "do_pad", "do_flip_channel_order", "rescale_offset")
_INTERPOLATION: Mapping[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""PIL.Image.Resampling, as the file holds it."""


def resolve_preprocessing(checkpoint: Checkpoint, default: Preprocessing) -> Preprocessing:
    """What the checkpoint's own settings say, the encoder's default where it brings none.

    Raises CheckpointError for settings that would give other pixels than `Preprocessing` can express.
    """
    config = checkpoint.preprocessor
    if config is None:
        return default
    height, width = default.size
    size = config.get("size", {"height": height, "width": width})
    problems = [f"{flag} = false" for flag in ("do_resize", "do_rescale", "do_normalize") if config.get(flag) is False]
    problems += [f"{flag} = true" for flag in _REFUSED if config.get(flag) is True]
    if size not in (height if height == width else None, {"height": height, "width": width}):
        problems.append(f"size = {size!r}")
    if config.get("rescale_factor", 1 / 255) not in (1 / 255, 0.00392156862745098):
        problems.append(f"rescale_factor = {config['rescale_factor']!r}")
    resample = config.get("resample", 2)
    interpolation = _INTERPOLATION.get(resample) if isinstance(resample, int) else None
    if interpolation is None:
        problems.append(f"resample = {resample!r}")
    mean, std = (_channels(config.get(name)) for name in ("image_mean", "image_std"))
    if std is not None and min(std) <= 0:
        std = None
    problems += [
        f"{name} = {config.get(name)!r}" for name, value in (("image_mean", mean), ("image_std", std)) if value is None
    ]
    if problems or interpolation is None or mean is None or std is None:
        raise CheckpointError(
            f"the {PREPROCESSOR_FILE} beside the weights asks for what this version does not do",
            where=checkpoint.source,
            expected=f"resize to {height} x {width} without crop, bilinear or bicubic, scale by 1/255, three means "
            "and three positive deviations",
            got="; ".join(problems),
            hint=f"pass the weights file from a folder without {PREPROCESSOR_FILE} to use the encoder's default",
        )
    return Preprocessing(default.size, "squash", interpolation, mean, std, PREPROCESSOR_FILE)


def _channels(value: object) -> tuple[float, float, float] | None:
    if isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) and math.isfinite(v) for v in value):
        first, second, third = (float(v) for v in value)
        return first, second, third
    return None
