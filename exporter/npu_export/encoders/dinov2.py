"""DINOv2 with registers (Oquab et al., arXiv 2304.07193; Darcet et al., arXiv 2309.16588)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from npu_export.encoders.blocks import (
    build_timm,
    cls_and_tokens,
    embedding_and_tokens,
    fuse_qkv,
    keep_modules,
    rename_modules,
)
from npu_export.encoders.images import IMAGENET, crop
from npu_export.encoders.spec import EncoderSpec, Layout, Positions, Published
from npu_export.encoders.vit import TIMM_BLOCK, VitShape
from npu_export.keymap import Drop, Rule, rename
from npu_export.operations import FoldPosition

if TYPE_CHECKING:
    from torch import nn

REGISTERS = 4
MASK_TOKEN = Drop("mask_token", "used in training alone")
# interpolate_pos_encoding in facebookresearch/dinov2, dinov2/models/vision_transformer.py: antialiased and
# without an offset for models with registers; transformers and timm do the same.
POSITIONS = Positions("pos_embed", 0, "bicubic", antialias=True)


def build_dinov2(shape: VitShape) -> nn.Module:
    """timm's VisionTransformer with registers and layer scales, without head or pooling.

    Its positions are those of the patches; that of the CLS token is part of `cls_token`.
    """
    return build_timm(
        "vit_small_patch14_reg4_dinov2",
        img_size=shape.image,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=0,
        global_pool="",
    )


def _timm_rules() -> tuple[Rule | Drop, ...]:
    return (
        rename("cls_token", "cls_token"),
        rename("reg_token", "reg_token"),
        rename("pos_embed", "pos_embed"),
        *_shared_rules(),
    )


def _meta_rules() -> tuple[Rule | Drop, ...]:
    return (
        Rule(("cls_token", "pos_embed"), ("cls_token", "pos_embed"), FoldPosition()),
        rename("register_tokens", "reg_token"),
        MASK_TOKEN,
        *_shared_rules(),
    )


def _shared_rules() -> tuple[Rule, ...]:
    """What Meta's file and timm's name alike."""
    return (
        *keep_modules(["patch_embed.proj", "norm", *(f"blocks.{{i}}.{module}" for module in TIMM_BLOCK)]),
        *(rename(f"blocks.{{i}}.{scale}.gamma", f"blocks.{{i}}.{scale}.gamma") for scale in ("ls1", "ls2")),
    )


def _hf_rules(query_key_value: Sequence[str], out: str) -> tuple[Rule | Drop, ...]:
    """Dinov2WithRegistersModel, whose attention has other names in its files than in transformers 5."""
    layer = "encoder.layer.{i}"
    return (
        Rule(("embeddings.cls_token", "embeddings.position_embeddings"), ("cls_token", "pos_embed"), FoldPosition()),
        rename("embeddings.register_tokens", "reg_token"),
        Drop("embeddings.mask_token", MASK_TOKEN.because),
        *rename_modules(
            {
                "embeddings.patch_embeddings.projection": "patch_embed.proj",
                f"{layer}.norm1": "blocks.{i}.norm1",
                f"{layer}.attention.{out}": "blocks.{i}.attn.proj",
                f"{layer}.norm2": "blocks.{i}.norm2",
                f"{layer}.mlp.fc1": "blocks.{i}.mlp.fc1",
                f"{layer}.mlp.fc2": "blocks.{i}.mlp.fc2",
                "layernorm": "norm",
            }
        ),
        *(rename(f"{layer}.layer_scale{n}.lambda1", f"blocks.{{i}}.ls{n}.gamma") for n in (1, 2)),
        *fuse_qkv(layer, [f"attention.{part}" for part in query_key_value]),
    )


def dinov2_encoder(published: Published, shape: VitShape) -> EncoderSpec:
    """DINOv2 with four registers, published by timm, Meta and Hugging Face."""
    layout = functools.partial(Layout, build=functools.partial(build_dinov2, shape), positions=POSITIONS)
    hf = functools.partial(
        layout,
        "hf",
        prefix="dinov2_with_registers.",
        beside=(Drop("classifier.weight", "head"), Drop("classifier.bias", "head")),
        config={
            "hidden_act": "gelu",
            "hidden_size": shape.width,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": shape.heads,
            "num_register_tokens": REGISTERS,
            "patch_size": shape.patch,
            "qkv_bias": True,
            "use_swiglu_ffn": False,
        },
    )
    old_names = [f"attention.{part}" for part in ("query", "key", "value")]
    return EncoderSpec(
        published=published,
        image_size=shape.image,
        stride=shape.patch,
        outputs=embedding_and_tokens(shape.width, patches=shape.patches, cls=1, registers=REGISTERS),
        with_outputs=cls_and_tokens,
        layouts=(
            layout("timm", _timm_rules(), about="timm's file"),
            layout("meta", _meta_rules(), about="Meta's .pth"),
            hf(rules=_hf_rules(old_names, "output.dense"), about="the hub's file"),
            hf(rules=_hf_rules(("q_proj", "k_proj", "v_proj"), "o_proj"), about="a state dict saved in transformers 5"),
        ),
        preprocessing=(
            crop(shape.image, shape.image, IMAGENET, "timm", "the encoder's default, as timm's configuration"),
            crop(
                shape.image,
                shape.image * 256 // 224,
                IMAGENET,
                "hf",
                "Hugging Face's BitImageProcessor, 256 to 224 pixels, in proportion",
            ),
            # make_classification_eval_transform in facebookresearch/dinov2, dinov2/data/transforms.py
            crop(
                shape.image,
                shape.image * 256 // 224,
                IMAGENET,
                "upstream",
                "Meta's evaluation, 256 to 224 pixels, in proportion",
            ),
        ),
        at_size=lambda image: dinov2_encoder(published, replace(shape, image=image)),
    )


DINOV2_SMALL_REG4 = dinov2_encoder(
    Published(
        name="dinov2-small-reg4",
        hub_id="timm/vit_small_patch14_reg4_dinov2.lvd142m",
        aliases=(
            "vit_small_patch14_reg4_dinov2",
            "vit_small_patch14_reg4_dinov2.lvd142m",
            "facebook/dinov2-with-registers-small",
        ),
        parameters=22_057_344,
    ),
    VitShape(image=518, patch=14, width=384, depth=12, heads=6),
)
