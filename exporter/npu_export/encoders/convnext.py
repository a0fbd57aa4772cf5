"""ConvNeXt as the image tower of a CLIP (Liu et al., arXiv 2201.03545; Ilharco et al., open_clip)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from npu_export.encoders.blocks import (
    OPEN_CLIP_TEXT_TOWER,
    build_timm,
    own_head,
)
from npu_export.encoders.images import CLIP, crop
from npu_export.encoders.spec import EncoderSpec, Layout, Lookalike, Published
from npu_export.keymap import Drop, Rule, rename
from npu_export.operations import Zeros
from npu_runtime.artifact.schema import TensorSpec

if TYPE_CHECKING:
    from torch import nn

STRIDE = 32
"""Pixels that one position of the last stage stands for."""


@dataclass(frozen=True, slots=True)
class ConvNextShape:
    """Sizes of a ConvNeXt; image in pixels, `embedding` the width of its projection."""

    image: int
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    embedding: int


def build_convnext(shape: ConvNextShape) -> nn.Module:
    """timm's ConvNeXt with a projection for a head; the bare name `convnext_base` has 1000 classes for one."""
    return build_timm(
        "convnext_base.clip_laion2b",
        depths=list(shape.depths),
        dims=list(shape.widths),
        num_classes=shape.embedding,
    )


def _trunk_rules(prefix: str) -> tuple[Rule, ...]:
    block = "stages.{i}.blocks.{j}"
    keys = [
        f"{module}.{leaf}"
        for module in (
            "stem.{i}",
            "stages.{i}.downsample.{j}",
            *(f"{block}.{part}" for part in ("conv_dw", "norm", "mlp.fc1", "mlp.fc2")),
            "head.norm",
        )
        for leaf in ("weight", "bias")
    ]
    return tuple(rename(prefix + key, key) for key in (*keys, f"{block}.gamma"))


def _timm_rules() -> tuple[Rule | Drop, ...]:
    return (*_trunk_rules(""), *(rename(key, key) for key in ("head.fc.weight", "head.fc.bias")))


def _open_clip_rules(embedding: int) -> tuple[Rule | Drop, ...]:
    """open_clip's TimmModel: the trunk, and a projection without a bias."""
    return (
        *_trunk_rules("trunk."),
        rename("head.proj.weight", "head.fc.weight"),
        Rule((), ("head.fc.bias",), Zeros((embedding,))),
    )


def convnext_encoder(published: Published, shape: ConvNextShape) -> EncoderSpec:
    """A ConvNeXt of CLIP, published by timm and open_clip. The embedding is not L2-normalised."""
    build = functools.partial(build_convnext, shape)
    return EncoderSpec(
        published=published,
        image_size=shape.image,
        stride=STRIDE,
        outputs=(TensorSpec("embedding", "float32", ("B", shape.embedding)),),
        with_outputs=own_head,
        layouts=(
            Layout("timm", _timm_rules(), build, about="timm's file"),
            Layout(
                "openclip",
                _open_clip_rules(shape.embedding),
                build,
                about="open_clip's file, with or without its text tower",
                beside=OPEN_CLIP_TEXT_TOWER,
            ),
        ),
        preprocessing=(
            crop(shape.image, shape.image, CLIP, "upstream", "the encoder's default, as open_clip's configuration"),
            # Hugging Face reads timm's repositories by TimmWrapperImageProcessor, which is timm's transform.
            crop(shape.image, shape.image, CLIP, "timm", "timm's configuration"),
        ),
        at_size=lambda image: convnext_encoder(published, replace(shape, image=image)),
    )


CONVNEXT_BASE_CLIP = convnext_encoder(
    Published(
        name="convnext-base-clip",
        hub_id="timm/convnext_base.clip_laion2b",
        aliases=("convnext_base.clip_laion2b", "convnext_base_w", "laion/CLIP-convnext_base_w-laion2B-s13B-b82K"),
        parameters=88_222_464,
        lookalikes=(
            Lookalike("head.proj.weight", (512, 1024), "a projection to 512: open_clip's convnext_base without _w"),
            Lookalike(
                "head.fc.weight", (1000, 1024), "a head of 1000 classes: timm's bare convnext_base, or fine-tuned"
            ),
        ),
        weight_files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ),
    ConvNextShape(image=256, depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024), embedding=640),
)
