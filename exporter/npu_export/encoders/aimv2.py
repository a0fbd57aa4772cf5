"""AIMv2 (Fini et al., arXiv 2411.14402)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from npu_export.encoders.blocks import (
    build_timm,
    embedding_and_tokens,
    fuse_qkv,
    mean_and_tokens,
)
from npu_export.encoders.images import CLIP, crop
from npu_export.encoders.spec import EncoderSpec, Layout, Lookalike, Published
from npu_export.keymap import Drop, Rule, rename
from npu_export.operations import Reshape

if TYPE_CHECKING:
    from torch import nn

TIMM_KEYS = (
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "patch_embed.norm.weight",
    "norm.weight",
    *(
        f"blocks.{{i}}.{module}.weight"
        for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")
    ),
)


@dataclass(frozen=True, slots=True)
class Aimv2Shape:
    """Sizes of an AIMv2; image and patch in pixels, `hidden` the width inside its gated MLP."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


def build_aimv2(shape: Aimv2Shape) -> nn.Module:
    """timm's VisionTransformer with RMSNorm, a gated MLP and no CLS token, without pooling."""
    return build_timm(
        "aimv2_large_patch14_224",
        img_size=shape.image,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=shape.hidden / shape.width,
        num_classes=0,
        global_pool="",
    )


def _apple_rules() -> tuple[Rule | Drop, ...]:
    """Apple's own names: fc1 is the gate, fc3 what it multiplies, fc2 the way back."""
    block = "trunk.blocks.{i}"
    return (
        rename("preprocessor.pos_embed", "pos_embed"),
        rename("preprocessor.patchifier.proj.weight", "patch_embed.proj.weight"),
        rename("preprocessor.patchifier.proj.bias", "patch_embed.proj.bias"),
        rename("preprocessor.patchifier.norm.weight", "patch_embed.norm.weight"),
        rename("trunk.post_trunk_norm.weight", "norm.weight"),
        *_rename_weights(
            block,
            {
                "norm_1": "norm1",
                "attn.qkv": "attn.qkv",
                "attn.proj": "attn.proj",
                "norm_2": "norm2",
                "mlp.fc1": "mlp.fc1_g",
                "mlp.fc3": "mlp.fc1_x",
                "mlp.fc2": "mlp.fc2",
            },
        ),
    )


def _hf_rules(width: int, out: str, gate: str, up: str, down: str) -> tuple[Rule | Drop, ...]:
    """Aimv2VisionModel, whose attention and MLP had other names before it came into transformers."""
    layer = "encoder.layers.{i}"
    return (
        rename("embeddings.patch_embed.weight", "patch_embed.proj.weight"),
        rename("embeddings.patch_embed.bias", "patch_embed.proj.bias"),
        rename("embeddings.rms_norm.weight", "patch_embed.norm.weight"),
        Rule(("embeddings.position_embedding.weight",), ("pos_embed",), Reshape((-1, width), (1, -1, width))),
        rename("rms_norm.weight", "norm.weight"),
        *_rename_weights(
            layer,
            {
                "rms_norm1": "norm1",
                f"attention.{out}": "attn.proj",
                "rms_norm2": "norm2",
                f"ffn.{gate}": "mlp.fc1_g",
                f"ffn.{up}": "mlp.fc1_x",
                f"ffn.{down}": "mlp.fc2",
            },
        ),
        *fuse_qkv(layer, ("attention.q_proj", "attention.k_proj", "attention.v_proj"), leaves=("weight",)),
    )


def _rename_weights(layer: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(
        rename(f"{layer}.{source}.weight", f"blocks.{{i}}.{target}.weight") for source, target in names.items()
    )


def aimv2_encoder(published: Published, shape: Aimv2Shape) -> EncoderSpec:
    """AIMv2, published by Apple, Hugging Face and timm. Its positions are not resampled by its publisher."""
    layout = functools.partial(Layout, build=functools.partial(build_aimv2, shape))
    hf = functools.partial(
        layout,
        "hf",
        config={
            "hidden_act": "silu",
            "hidden_size": shape.width,
            "num_attention_heads": shape.heads,
            "patch_size": shape.patch,
            "qkv_bias": False,
            "rms_norm_eps": 1e-5,
        },
    )
    return EncoderSpec(
        published=published,
        image_size=shape.image,
        stride=shape.patch,
        outputs=embedding_and_tokens(shape.width, patches=shape.patches),
        with_outputs=mean_and_tokens,
        layouts=(
            hf(
                rules=_hf_rules(shape.width, "out_proj", "gate_proj", "up_proj", "down_proj"),
                about="the hub's file",
            ),
            hf(rules=_hf_rules(shape.width, "proj_out", "fc1", "fc3", "fc2"), about="an older file of the hub"),
            layout("apple", _apple_rules(), about="Apple's original"),
            layout("timm", tuple(rename(key, key) for key in TIMM_KEYS), about="timm's file"),
        ),
        preprocessing=(
            # Apple publishes no other way than this file, which Hugging Face's CLIPImageProcessor reads.
            crop(shape.image, shape.image, CLIP, "hf", "the encoder's default, as Apple's preprocessor_config.json"),
            crop(shape.image, shape.image, CLIP, "timm", "timm's configuration"),
        ),
        at_size=lambda image: aimv2_encoder(published, replace(shape, image=image)),
    )


AIMV2_LARGE_DISTILLED = aimv2_encoder(
    Published(
        name="aimv2-large-distilled",
        hub_id="apple/aimv2-large-patch14-224-distilled",
        aliases=("aimv2_large_patch14_224", "aimv2_large_patch14_224.apple_pt_dist"),
        parameters=309_197_824,
        lookalikes=tuple(
            Lookalike(
                f"head.{key}",
                None,
                "a pooling head: -lit models have one, and transformers makes up a random one unless use_head=False",
            )
            for key in ("cls_token", "k_proj.weight", "v_proj.weight", "output_proj.weight")
        ),
    ),
    Aimv2Shape(image=224, patch=14, width=1024, depth=24, heads=8, hidden=2816),
)
