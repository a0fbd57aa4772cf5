"""Perception Encoder, the language-aligned one (Bolya et al., arXiv 2504.13181)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from npu_export.encoders.blocks import (
    OPEN_CLIP_TEXT_TOWER,
    WEIGHT_AND_BIAS,
    build_timm,
    cls_and_tokens,
    embedding_and_tokens,
    keep_modules,
    rename_modules,
)
from npu_export.encoders.images import HALF, crop, squash
from npu_export.encoders.spec import EncoderSpec, Layout, Lookalike, Positions, Published
from npu_export.encoders.vit import TIMM_BLOCK, VitShape
from npu_export.keymap import Drop, Rule, rename
from npu_export.operations import Reshape

if TYPE_CHECKING:
    from torch import nn


def build_pe_lang(shape: VitShape, reference_grid: int | None) -> nn.Module:
    """timm's Eva as PE-Lang, without head.

    Rotary positions count patches as Meta's do (Rope2D.update_grid in facebookresearch/perception_models,
    core/vision_encoder/rope.py); with a reference grid they are scaled to it, as timm's are. At the
    published size both are the same.
    """
    return build_timm(
        "vit_pe_lang_large_patch14_448",
        img_size=shape.image,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=0,
        global_pool="token",
        ref_feat_shape=None if reference_grid is None else (reference_grid, reference_grid),
    )


def _meta_rules(width: int) -> tuple[Rule | Drop, ...]:
    """Meta's names, which are open_clip's."""
    block = "transformer.resblocks.{i}"
    return (
        Rule(("class_embedding",), ("cls_token",), Reshape((width,), (1, 1, width))),
        Rule(("positional_embedding",), ("pos_embed",), Reshape((-1, width), (1, -1, width))),
        rename("conv1.weight", "patch_embed.proj.weight"),
        *rename_modules(
            {
                "ln_pre": "norm_pre",
                f"{block}.ln_1": "blocks.{i}.norm1",
                f"{block}.attn.out_proj": "blocks.{i}.attn.proj",
                f"{block}.ln_2": "blocks.{i}.norm2",
                f"{block}.mlp.c_fc": "blocks.{i}.mlp.fc1",
                f"{block}.mlp.c_proj": "blocks.{i}.mlp.fc2",
            }
        ),
        *(rename(f"{block}.attn.in_proj_{leaf}", f"blocks.{{i}}.attn.qkv.{leaf}") for leaf in WEIGHT_AND_BIAS),
        *(rename(f"{block}.ls_{n}.gamma", f"blocks.{{i}}.gamma_{n}") for n in (1, 2)),
    )


def _timm_rules() -> tuple[Rule | Drop, ...]:
    return (
        *(rename(key, key) for key in ("cls_token", "pos_embed", "patch_embed.proj.weight")),
        *keep_modules(["norm_pre", *(f"blocks.{{i}}.{module}" for module in TIMM_BLOCK)]),
        *(rename(f"blocks.{{i}}.gamma_{n}", f"blocks.{{i}}.gamma_{n}") for n in (1, 2)),
    )


def pe_lang_encoder(published: Published, shape: VitShape, reference_grid: int) -> EncoderSpec:
    """PE-Lang, published by Meta and timm; the embedding is the CLS token, and there is no final norm.

    `reference_grid` is the patches along a side of the images that it was published for.
    """
    return EncoderSpec(
        published=published,
        image_size=shape.image,
        stride=shape.patch,
        outputs=embedding_and_tokens(shape.width, patches=shape.patches, cls=1),
        with_outputs=cls_and_tokens,
        layouts=(
            Layout(
                "meta",
                _meta_rules(shape.width),
                functools.partial(build_pe_lang, shape, None),
                about="Meta's .pt, in open_clip's style",
                beside=OPEN_CLIP_TEXT_TOWER,
                # VisionTransformer._sample_abs_posemb in perception_models, core/vision_encoder/pe.py
                positions=Positions("pos_embed", 1, "bilinear", antialias=False),
            ),
            Layout(
                "timm",
                _timm_rules(),
                functools.partial(build_pe_lang, shape, reference_grid),
                about="timm's file",
                # resample_abs_pos_embed in timm's layers/pos_embed.py
                positions=Positions("pos_embed", 1, "bicubic", antialias=True),
            ),
        ),
        preprocessing=(
            # get_image_transform in facebookresearch/perception_models, core/vision_encoder/transforms.py
            squash(shape.image, "bilinear", HALF, "upstream", "the encoder's default, as Meta's transforms"),
            squash(shape.image, "bicubic", HALF, "hf", "a single tile of Hugging Face's PerceptionLMImageProcessor"),
            crop(shape.image, shape.image, HALF, "timm", "timm's configuration"),
        ),
        at_size=lambda image: pe_lang_encoder(published, replace(shape, image=image), reference_grid),
    )


PE_LANG_L14_448 = pe_lang_encoder(
    Published(
        name="pe-lang-l14-448",
        hub_id="facebook/PE-Lang-L14-448",
        aliases=("vit_pe_lang_large_patch14_448", "vit_pe_lang_large_patch14_448.fb", "PE-Lang-L14-448"),
        parameters=291_415_040,
        lookalikes=(
            Lookalike("ln_post.weight", None, "a final norm (ln_post): PE-Core has one, PE-Lang has none"),
            Lookalike("attn_pool.probe", None, "attention pooling (attn_pool): PE-Core has it, PE-Lang does not"),
        ),
        weight_files=("PE-Lang-L14-448.pt",),
    ),
    VitShape(image=448, patch=14, width=1024, depth=23, heads=16),
    reference_grid=32,
)
