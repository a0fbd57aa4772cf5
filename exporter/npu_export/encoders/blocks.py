"""What the families share: rules that come in pairs of weight and bias, shapes of tokens, building by timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from npu_export.keymap import Drop, Rule, concatenate, rename
from npu_export.timm_import import import_timm
from npu_runtime.artifact.schema import TensorSpec, TokenGroup

if TYPE_CHECKING:
    from torch import nn

WEIGHT_AND_BIAS = ("weight", "bias")
OPEN_CLIP_TEXT_TOWER = tuple(
    Drop(key, "text tower")
    for key in (
        "positional_embedding",
        "text_projection",
        "token_embedding.weight",
        "logit_scale",
        "ln_final.weight",
        "ln_final.bias",
        "transformer.resblocks.{i}.attn.in_proj_weight",
        "transformer.resblocks.{i}.attn.in_proj_bias",
        *(
            f"transformer.resblocks.{{i}}.{module}.{leaf}"
            for module in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
            for leaf in WEIGHT_AND_BIAS
        ),
    )
)
"""Keys of the text tower that open_clip, and files in its style, keep without a prefix."""


def rename_modules(names: Mapping[str, str], leaves: Sequence[str] = WEIGHT_AND_BIAS) -> tuple[Rule, ...]:
    """A rename of each module's tensors."""
    return tuple(rename(f"{source}.{leaf}", f"{target}.{leaf}") for source, target in names.items() for leaf in leaves)


def keep_modules(names: Sequence[str], leaves: Sequence[str] = WEIGHT_AND_BIAS) -> tuple[Rule, ...]:
    """Modules whose tensors have the network's own names."""
    return rename_modules({name: name for name in names}, leaves)


def fuse_qkv(layer: str, parts: Sequence[str], leaves: Sequence[str] = WEIGHT_AND_BIAS) -> tuple[Rule, ...]:
    """Three projections of a layer, in the order query, key, value, as timm's fused one."""
    return tuple(
        concatenate([f"{layer}.{part}.{leaf}" for part in parts], f"blocks.{{i}}.attn.qkv.{leaf}") for leaf in leaves
    )


def drop_modules(names: Sequence[str], because: str) -> tuple[Drop, ...]:
    return tuple(Drop(f"{name}.{leaf}", because) for name in names for leaf in WEIGHT_AND_BIAS)


def embedding_and_tokens(width: int, *, patches: int, cls: int = 0, registers: int = 0) -> tuple[TensorSpec, ...]:
    """Outputs of a network whose tokens are CLS, registers and patches in that order, as many as said."""
    tokens = cls + registers + patches
    groups = (
        TokenGroup("cls", 0, cls),
        TokenGroup("registers", cls, cls + registers),
        TokenGroup("patches", cls + registers, tokens),
    )
    return (
        TensorSpec("embedding", "float32", ("B", width)),
        TensorSpec("tokens", "float32", ("B", tokens, width), tuple(g for g in groups if g.start < g.stop)),
    )


def build_timm(name: str, **settings: Any) -> nn.Module:
    """timm's network of this name with some settings of its own, without pretrained weights, in eval mode."""
    import_timm()
    import timm

    create: Callable[..., nn.Module] = timm.create_model
    return create(name, pretrained=False, **settings).eval()


def cls_and_tokens(network: nn.Module) -> nn.Module:
    from npu_export.encoders.outputs import ClsAndTokens

    return ClsAndTokens(network)


def mean_and_tokens(network: nn.Module) -> nn.Module:
    from npu_export.encoders.outputs import MeanAndTokens

    return MeanAndTokens(network)


def own_head(network: nn.Module) -> nn.Module:
    from npu_export.encoders.outputs import OwnHead

    return OwnHead(network)
