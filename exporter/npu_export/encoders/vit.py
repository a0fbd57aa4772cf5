"""Plain vision transformers with a CLS token (Dosovitskiy et al., arXiv 2010.11929)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from npu_export.encoders.blocks import (
    build_timm,
    cls_and_tokens,
    drop_modules,
    embedding_and_tokens,
    fuse_qkv,
    keep_modules,
    rename_modules,
)
from npu_export.encoders.images import HALF, crop, squash
from npu_export.encoders.spec import EncoderSpec, Layout, Positions, Published
from npu_export.keymap import Drop, Rule, rename
from npu_export.operations import Chain, Concatenate, Operation, Reshape, Transpose

if TYPE_CHECKING:
    from torch import nn

NO_HEAD = "the encoder ends at the final norm"
TIMM_BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True, slots=True)
class VitShape:
    """Sizes of a plain ViT; image and patch in pixels."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


def build_vit(shape: VitShape, norm_eps: float, activation: str) -> nn.Module:
    """timm's VisionTransformer without head or pooling."""
    from torch import nn

    return build_timm(
        "vit_base_patch16_224",
        img_size=shape.image,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=0,
        global_pool="",
        norm_layer=functools.partial(nn.LayerNorm, eps=norm_eps),
        act_layer=activation,
    )


def _hf_rules(layer: str, query_key_value: Sequence[str], out: str, fc1: str, fc2: str) -> tuple[Rule | Drop, ...]:
    """Hugging Face's ViTModel, whose layers have other names in its files than in transformers 5, to timm's."""
    return (
        rename("embeddings.cls_token", "cls_token"),
        rename("embeddings.position_embeddings", "pos_embed"),
        *rename_modules(
            {
                "embeddings.patch_embeddings.projection": "patch_embed.proj",
                f"{layer}.layernorm_before": "blocks.{i}.norm1",
                f"{layer}.attention.{out}": "blocks.{i}.attn.proj",
                f"{layer}.layernorm_after": "blocks.{i}.norm2",
                f"{layer}.{fc1}": "blocks.{i}.mlp.fc1",
                f"{layer}.{fc2}": "blocks.{i}.mlp.fc2",
                "layernorm": "norm",
            }
        ),
        *fuse_qkv(layer, [f"attention.{part}" for part in query_key_value]),
        *drop_modules(["pooler.dense"], NO_HEAD),
    )


def _timm_rules() -> tuple[Rule | Drop, ...]:
    return (
        rename("cls_token", "cls_token"),
        rename("pos_embed", "pos_embed"),
        *keep_modules(["patch_embed.proj", "norm", *(f"blocks.{{i}}.{module}" for module in TIMM_BLOCK)]),
        *drop_modules(["head", "pre_logits.fc"], NO_HEAD),
    )


def _jax_rules(
    shape: VitShape, attention: int, norm2: int, mlp: int, positions: str = "Transformer/posembed_input/pos_embedding"
) -> tuple[Rule | Drop, ...]:
    """Google's .npz, whose kernels are [in, out] and whose submodules are numbered in two ways."""
    width, heads, head = shape.width, shape.heads, shape.width // shape.heads
    block, transposed = "Transformer/encoderblock_{i}", Transpose((1, 0))
    attend = f"{block}/MultiHeadDotProductAttention_{attention}"
    flat: Mapping[str, Operation] = {
        "kernel": Chain((Reshape((width, heads, head), (width, width)), transposed)),
        "bias": Reshape((heads, head), (width,)),
    }
    kernels: dict[str, tuple[str, Operation]] = {
        "embedding": ("patch_embed.proj", Transpose((3, 2, 0, 1))),
        f"{attend}/out": ("blocks.{i}.attn.proj", Chain((Reshape((heads, head, width), (width, width)), transposed))),
        f"{block}/MlpBlock_{mlp}/Dense_0": ("blocks.{i}.mlp.fc1", transposed),
        f"{block}/MlpBlock_{mlp}/Dense_1": ("blocks.{i}.mlp.fc2", transposed),
    }
    norms = {
        f"{block}/LayerNorm_0": "blocks.{i}.norm1",
        f"{block}/LayerNorm_{norm2}": "blocks.{i}.norm2",
        "Transformer/encoder_norm": "norm",
    }
    return (
        rename("cls", "cls_token"),
        rename(positions, "pos_embed"),
        *(
            Rule((f"{source}/kernel",), (f"{target}.weight",), operation)
            for source, (target, operation) in kernels.items()
        ),
        *(rename(f"{source}/bias", f"{target}.bias") for source, (target, _) in kernels.items()),
        *(rename(f"{source}/scale", f"{target}.weight") for source, target in norms.items()),
        *(rename(f"{source}/bias", f"{target}.bias") for source, target in norms.items()),
        *(
            Rule(
                tuple(f"{attend}/{part}/{leaf}" for part in ("query", "key", "value")),
                (f"blocks.{{i}}.attn.qkv.{target}",),
                Chain((flat[leaf], Concatenate(3))),
            )
            for leaf, target in (("kernel", "weight"), ("bias", "bias"))
        ),
        *(Drop(f"{module}/{leaf}", NO_HEAD) for module in ("head", "pre_logits") for leaf in ("kernel", "bias")),
    )


def vit_encoder(published: Published, shape: VitShape) -> EncoderSpec:
    """A plain ViT published by Google, Hugging Face and timm.

    LayerNorm's eps is 1e-12 in Hugging Face's network (`layer_norm_eps` of its config.json) and 1e-6 in
    timm's and in flax. Google's network has GELU by tanh, as `flax.linen.gelu` is by default; both ports
    have the exact one.
    """
    hf = functools.partial(
        Layout,
        "hf",
        build=functools.partial(build_vit, shape, 1e-12, "gelu"),
        prefix="vit.",
        beside=drop_modules(["classifier"], NO_HEAD),
        config={
            "hidden_act": "gelu",
            "hidden_size": shape.width,
            "layer_norm_eps": 1e-12,
            "num_attention_heads": shape.heads,
            "patch_size": shape.patch,
            "qkv_bias": True,
        },
        # ViTEmbeddings.interpolate_pos_encoding in transformers' models/vit/modeling_vit.py
        positions=Positions("pos_embed", 1, "bicubic", antialias=False),
    )
    parts = ("query", "key", "value")
    in_files = (
        "encoder.layer.{i}",
        [f"attention.{part}" for part in parts],
        "output.dense",
        "intermediate.dense",
        "output.dense",
    )
    at_run_time = ("layers.{i}", [f"{part[0]}_proj" for part in parts], "o_proj", "mlp.fc1", "mlp.fc2")
    jax = functools.partial(
        Layout,
        "jax",
        build=functools.partial(build_vit, shape, 1e-6, "gelu_tanh"),
        # scipy.ndimage.zoom(order=1) in google-research/vision_transformer, vit_jax/checkpoint.py
        positions=Positions("pos_embed", 1, "bilinear", antialias=False, align_corners=True),
    )
    return EncoderSpec(
        published=published,
        image_size=shape.image,
        stride=shape.patch,
        outputs=embedding_and_tokens(shape.width, patches=shape.patches, cls=1),
        with_outputs=cls_and_tokens,
        layouts=(
            hf(rules=_hf_rules(*in_files), about="the hub's file, with or without `vit.`"),
            hf(rules=_hf_rules(*at_run_time), about="a state dict saved in transformers 5"),
            Layout(
                "timm",
                _timm_rules(),
                functools.partial(build_vit, shape, 1e-6, "gelu"),
                about="timm's file",
                # resample_abs_pos_embed in timm's layers/pos_embed.py
                positions=Positions("pos_embed", 1, "bicubic", antialias=True),
            ),
            jax(rules=_jax_rules(shape, 1, 2, 3), about="Google's .npz"),
            jax(rules=_jax_rules(shape, 0, 1, 0), about="Google's .npz, numbered anew"),
            jax(rules=_jax_rules(shape, 0, 1, 0, "pos_embedding"), about="big_vision's .npz", prefix="params/"),
        ),
        preprocessing=(
            squash(shape.image, "bilinear", HALF, "hf", "the encoder's default, as Hugging Face's ViTImageProcessor"),
            # Google's own (google-research/vision_transformer, vit_jax/input_pipeline.py) squashes by a bilinear too,
            # but without antialiasing, which pillow does not do.
            crop(shape.image, int(shape.image / 0.9), HALF, "timm", "timm's configuration, crop_pct 0.9"),
        ),
        at_size=lambda image: vit_encoder(published, replace(shape, image=image)),
    )


VIT_BASE = vit_encoder(
    Published(
        name="vit-base",
        hub_id="google/vit-base-patch16-224",
        aliases=("vit_base_patch16_224",),
        parameters=85_798_656,
    ),
    VitShape(image=224, patch=16, width=768, depth=12, heads=12),
)
