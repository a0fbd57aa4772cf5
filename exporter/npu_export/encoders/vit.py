"""Plain vision transformers with a CLS token, built by timm (Dosovitskiy et al., arXiv 2010.11929)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from npu_export.encoders.spec import EncoderSpec, Layout
from npu_export.keymap import Concatenate, Drop, Rename, Rule
from npu_export.timm_import import import_timm
from npu_runtime.artifact.schema import Preprocessing, TensorSpec, Tolerance

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class VitShape:
    """Sizes of a plain ViT; image and patch in pixels."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    @property
    def parameters(self) -> int:
        """Elements of patches, CLS, positions, final norm and blocks (two norms, qkv, proj, mlp of 4 x)."""
        w = self.width
        stem = 3 * self.patch**2 * w + w + w + self.tokens * w + 2 * w
        return stem + self.depth * (12 * w * w + 13 * w)


def build_vit(shape: VitShape, norm_eps: float) -> nn.Module:
    """timm's VisionTransformer without head or pooling, in eval mode."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    network: nn.Module = VisionTransformer(
        img_size=shape.image,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=0,
        global_pool="",
        norm_layer=functools.partial(nn.LayerNorm, eps=norm_eps),
    )
    return network.eval()


def cls_and_tokens(network: nn.Module) -> nn.Module:
    from npu_export.encoders.outputs import ClsAndTokens

    return ClsAndTokens(network).eval()


def _hf_rules() -> tuple[Rule, ...]:
    """Hugging Face's ViTForImageClassification, as on the hub, to timm's VisionTransformer."""
    layer = "vit.encoder.layer.{i}"
    names = {
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        f"{layer}.layernorm_before": "blocks.{i}.norm1",
        f"{layer}.attention.output.dense": "blocks.{i}.attn.proj",
        f"{layer}.layernorm_after": "blocks.{i}.norm2",
        f"{layer}.intermediate.dense": "blocks.{i}.mlp.fc1",
        f"{layer}.output.dense": "blocks.{i}.mlp.fc2",
        "vit.layernorm": "norm",
    }
    rules: list[Rule] = [
        Rename("vit.embeddings.cls_token", "cls_token"),
        Rename("vit.embeddings.position_embeddings", "pos_embed"),
    ]
    for leaf in ("weight", "bias"):
        rules += [Rename(f"{source}.{leaf}", f"{target}.{leaf}") for source, target in names.items()]
        qkv = tuple(f"{layer}.attention.attention.{part}.{leaf}" for part in ("query", "key", "value"))
        rules.append(Concatenate(qkv, f"blocks.{{i}}.attn.qkv.{leaf}"))
        rules.append(Drop(f"classifier.{leaf}", "the encoder ends at the final norm"))
    return tuple(rules)


def vit_encoder(
    name: str, shape: VitShape, *, hub_id: str, aliases: tuple[str, ...], tolerances: tuple[Tolerance, ...]
) -> EncoderSpec:
    """A plain ViT published by Hugging Face, whose LayerNorm has eps 1e-12 where timm's has 1e-6."""
    norm_eps = 1e-12
    hf = Layout(
        name="hf",
        rules=_hf_rules(),
        build=functools.partial(build_vit, shape, norm_eps),
        config={
            "hidden_act": "gelu",
            "hidden_size": shape.width,
            "image_size": shape.image,
            "layer_norm_eps": norm_eps,
            "num_attention_heads": shape.heads,
            "patch_size": shape.patch,
            "qkv_bias": True,
        },
    )
    return EncoderSpec(
        name=name,
        hub_id=hub_id,
        aliases=aliases,
        parameters=shape.parameters,
        inputs=(TensorSpec("pixel_values", "float32", ("B", 3, shape.image, shape.image)),),
        outputs=(
            TensorSpec("embedding", "float32", ("B", shape.width)),
            TensorSpec("tokens", "float32", ("B", shape.tokens, shape.width)),
        ),
        with_outputs=cls_and_tokens,
        layouts=(hf,),
        preprocessing=Preprocessing(
            size=(shape.image, shape.image),
            resize="squash",
            interpolation="bilinear",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            source="the encoder's default, as Hugging Face's ViTImageProcessor",
        ),
        tolerances=tolerances,
    )


def _tolerances() -> tuple[Tolerance, ...]:
    """Limits for fp32, about ten times what was measured on seeded weights with outputs up to 5.

    Measured with onnxruntime 1.31 on an x86 CPU over batch sizes 1 and 4: 5.3e-6 and 8.4e-7; TorchScript
    0 on the same CPU. For scale, on the same weights: tanh for exact GELU gives 7.5e-4, LayerNorm's eps of
    1e-6 for 1e-12 gives 2.7e-5, which no limit with room for another CPU's rounding can refuse.
    """
    basis = "about ten times the largest difference measured with onnxruntime 1.31 on an x86 CPU, seeded weights"
    limits: tuple[tuple[Literal["max_abs_error", "max_relative_l2_error"], float], ...] = (
        ("max_abs_error", 5e-5),
        ("max_relative_l2_error", 1e-5),
    )
    return tuple(
        Tolerance(output, metric, limit, basis) for output in ("embedding", "tokens") for metric, limit in limits
    )


VIT_BASE = vit_encoder(
    "vit-base",
    VitShape(image=224, patch=16, width=768, depth=12, heads=12),
    hub_id="google/vit-base-patch16-224",
    aliases=("vit_base_patch16_224",),
    tolerances=_tolerances(),
)
