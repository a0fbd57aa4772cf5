"""How the publishers of encoders prepare images, as `Preprocessing` at any size."""

from __future__ import annotations

from typing import Literal, TypeAlias

from npu_runtime.artifact.schema import Preprocessing, Publisher

Triple: TypeAlias = tuple[float, float, float]
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Means and deviations; CLIP's as in openai/CLIP, clip/clip.py."""


def squash(
    image_size: int,
    interpolation: Literal["bilinear", "bicubic"],
    colours: tuple[Triple, Triple],
    publisher: Publisher,
    source: str,
) -> Preprocessing:
    """The whole image, whatever its aspect ratio, to a square."""
    mean, std = colours
    return Preprocessing((image_size, image_size), None, interpolation, mean, std, source, publisher)


def crop(
    image_size: int, edge: int, colours: tuple[Triple, Triple], publisher: Publisher, source: str
) -> Preprocessing:
    """The shorter side to `edge` by a bicubic, then the square at the centre.

    The offset of the square is rounded down by transformers and to
    even by torchvision, which the others use.
    """
    mean, std = colours
    offset: Literal["even", "down"] = "down" if publisher == "hf" else "even"
    return Preprocessing((image_size, image_size), edge, "bicubic", mean, std, source, publisher, offset)
