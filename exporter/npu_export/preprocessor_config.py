"""The publisher's own settings for images, as `Preprocessing`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from npu_export.checkpoint import CONFIG_FILE, PREPROCESSOR_FILE
from npu_export.errors import CheckpointError
from npu_export.network import WeightsPlan
from npu_runtime.artifact.schema import Preprocessing, Publisher
from npu_runtime.errors import UsageError

_REFUSED = ("do_pad", "do_flip_channel_order", "rescale_offset")
_INTERPOLATION: Mapping[object, Literal["bilinear", "bicubic"]] = {
    2: "bilinear",
    3: "bicubic",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}
"""PIL.Image.Resampling, as Hugging Face's file holds it, and timm's names."""


def resolve_preprocessing(plan: WeightsPlan, publisher: Publisher | None = None) -> Preprocessing:
    """What the checkpoint's own settings say, the encoder's default where it brings none.

    Hugging Face's preprocessor_config.json comes first, then timm's config.json. A publisher that was asked for is
    taken alone: its file where that lies beside the weights, else what the encoder knows of it. Settings for
    images of another size give everything but that size. Raises UsageError for a publisher without either,
    CheckpointError for settings that would give other pixels than `Preprocessing` can express.
    """
    checkpoint = plan.checkpoint
    known = {steps.publisher: steps for steps in plan.encoder.preprocessing}
    default = known.get(publisher, plan.encoder.preprocessing[0])
    if checkpoint.preprocessor is not None and publisher in (None, "hf"):
        return _from_hugging_face(checkpoint.preprocessor, default, checkpoint.source)
    pretrained = (checkpoint.config or {}).get("pretrained_cfg")
    if isinstance(pretrained, dict) and publisher in (None, "timm"):
        return _from_timm(pretrained, default, checkpoint.source)
    if publisher is not None and publisher not in known:
        raise UsageError(
            f"{plan.encoder.name} is not known to be prepared for by this publisher in a way of its own",
            expected=", ".join(str(name) for name in known),
            got=publisher,
            hint="without --preprocess the settings beside the weights hold, then the first of these",
        )
    return default


def _from_hugging_face(config: Mapping[str, object], default: Preprocessing, where: str) -> Preprocessing:
    """ViTImageProcessor squashes to `size`; CLIPImageProcessor and BitImageProcessor cut `crop_size` out."""
    crops = config.get("do_center_crop") is True
    size = _square(config.get("crop_size" if crops else "size", default.size[0]))
    edge = _shortest_edge(config.get("size")) if crops else None
    problems = [f"{flag} = false" for flag in ("do_resize", "do_rescale", "do_normalize") if config.get(flag) is False]
    problems += [f"{flag} = true" for flag in _REFUSED if config.get(flag) is True]
    if size is None or (crops and (edge is None or edge < size)):
        given = [f"{name} = {config[name]!r}" for name in ("size", "crop_size") if name in config]
        problems += given or ["do_center_crop = true"]
    if config.get("rescale_factor", 1 / 255) not in (1 / 255, 0.00392156862745098):
        problems.append(f"rescale_factor = {config['rescale_factor']!r}")
    resized = default if (size, size) != default.size else replace(default, shortest_edge=edge)
    note = "" if (size, size) == default.size else f", which is for {size} pixels"
    return _with_pixels(
        replace(
            resized,
            source=PREPROCESSOR_FILE + note,
            publisher="hf",
            crop_offset="even" if resized.shortest_edge is None else "down",
        ),
        interpolation=("resample", config.get("resample", 3 if crops else 2)),  # the defaults of those classes
        mean=("image_mean", config.get("image_mean")),
        std=("image_std", config.get("image_std")),
        problems=problems,
        where=where,
    )


def _from_timm(config: Mapping[str, object], default: Preprocessing, where: str) -> Preprocessing:
    """As transforms_imagenet_eval in timm's data/transforms_factory.py: the shorter side to size / crop_pct, centre."""
    problems = [] if config.get("crop_mode", "center") == "center" else [f"crop_mode = {config['crop_mode']!r}"]
    crop = config.get("crop_pct", 1.0)
    if not isinstance(crop, (int, float)) or not 0 < crop <= 1:
        problems.append(f"crop_pct = {crop!r}")
        crop = 1.0
    edge = math.floor(default.size[0] / crop)
    return _with_pixels(
        replace(
            default,
            shortest_edge=edge,
            source=f"pretrained_cfg in {CONFIG_FILE}",
            publisher="timm",
            crop_offset="even",
        ),
        interpolation=("interpolation", config.get("interpolation", "bicubic")),
        mean=("mean", config.get("mean")),
        std=("std", config.get("std")),
        problems=problems,
        where=where,
    )


def _with_pixels(
    resized: Preprocessing,
    *,
    interpolation: tuple[str, object],
    mean: tuple[str, object],
    std: tuple[str, object],
    problems: list[str],
    where: str,
) -> Preprocessing:
    """The settings with values given as (name in the file, value); refuses what is wrong, all at once."""
    kind = _INTERPOLATION.get(interpolation[1]) if isinstance(interpolation[1], (int, str)) else None
    means, deviations = _channels(mean[1]), _channels(std[1])
    if deviations is not None and min(deviations) <= 0:
        deviations = None
    given = ((interpolation, kind), (mean, means), (std, deviations))
    problems = problems + [f"{name} = {value!r}" for (name, value), parsed in given if parsed is None]
    if problems or kind is None or means is None or deviations is None:
        raise CheckpointError(
            "the settings beside the weights ask for what this version does not do",
            where=f"{where}, {resized.source}",
            expected="a resize to a square or a cut from its centre, bilinear or bicubic, scale by 1/255, three means "
            "and three positive deviations",
            got="; ".join(problems),
            hint="pass the weights file from a folder without these settings to use the encoder's default",
        )
    return replace(resized, interpolation=kind, mean=means, std=deviations)


def _square(size: object) -> int | None:
    """The side of a square, from a number or from an object of height and width."""
    if isinstance(size, dict) and size.keys() >= {"height", "width"} and size["height"] == size["width"]:
        size = size["height"]
    return size if type(size) is int and size > 0 else None


def _shortest_edge(size: object) -> int | None:
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    return edge if type(edge) is int and edge > 0 else None


def _channels(value: object) -> tuple[float, float, float] | None:
    if isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) and math.isfinite(v) for v in value):
        first, second, third = (float(v) for v in value)
        return first, second, third
    return None
