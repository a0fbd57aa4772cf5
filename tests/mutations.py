"""Faults that a wrong remapping or a wrong freeze would leave in a network, small enough to be missed by eye.

Each takes a network as timm builds it, and changes it in place. They act in the middle block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import npu_export.pipeline as pipeline

Array = np.ndarray[Any, np.dtype[np.float32]]
Mutation = Callable[[Any], None]


def middle(blocks: Any) -> Any:
    return blocks[len(blocks) // 2]


def swap_query_and_key(network: Any) -> None:
    for tensor in middle(network.blocks).attn.qkv.parameters():
        query, key, value = tensor.data.chunk(3)
        tensor.data = torch.cat([key, query, value])


def swap_blocks(network: Any) -> None:
    first = len(network.blocks) // 2 - 1
    network.blocks[first], network.blocks[first + 1] = network.blocks[first + 1], network.blocks[first]


def swap_stage_blocks(network: Any) -> None:
    blocks = max((stage.blocks for stage in network.stages), key=len)
    first = len(blocks) // 2 - 1
    blocks[first], blocks[first + 1] = blocks[first + 1], blocks[first]


def tanh_gelu(network: Any) -> None:
    for block in network.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def other_eps(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-4


def perturb_one_weight(network: Any) -> None:
    max(network.parameters(), key=torch.Tensor.numel).data.view(-1)[12345 % 4096] += 0.05


def transpose_a_matrix(network: Any) -> None:
    weight = middle(network.blocks).attn.proj.weight
    weight.data = weight.data.T.contiguous()


def transpose_position_grid(network: Any) -> None:
    """Rows for columns, the positions before the grid as they are."""
    tokens = network.pos_embed.shape[1]
    side = int(tokens**0.5)
    prefix = tokens - side**2
    positions = network.pos_embed.data
    grid = positions[:, prefix:].unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
    network.pos_embed.data = torch.cat([positions[:, :prefix], grid], dim=1)


def registers_at_initialisation(network: Any) -> None:
    """What timm leaves in registers that no key fills."""
    network.reg_token.data = torch.randn(network.reg_token.shape, generator=torch.Generator().manual_seed(0)) * 1e-6


def rope_off(network: Any) -> None:
    sin, cos = network.rope.pos_embed.chunk(2, dim=-1)
    network.rope.pos_embed = torch.cat([torch.zeros_like(sin), torch.ones_like(cos)], dim=-1)


def swap_gate_and_up(network: Any) -> None:
    mlp = middle(network.blocks).mlp
    mlp.fc1_g, mlp.fc1_x = mlp.fc1_x, mlp.fc1_g


def enlarge_a_matrix(network: Any) -> None:
    """By one part in a hundred."""
    blocks = network.blocks if hasattr(network, "blocks") else max((s.blocks for s in network.stages), key=len)
    middle(blocks).mlp.fc2.weight.data *= 1.01


def forget_the_projections_bias(network: Any) -> None:
    network.head.fc.bias.data = torch.zeros_like(network.head.fc.bias)


def forget_a_layer_scale(network: Any) -> None:
    block = middle(max((stage.blocks for stage in network.stages), key=len))
    block.gamma.data = torch.full_like(block.gamma, float(block.gamma.mean()))


TRANSFORMER: tuple[Mutation, ...] = (
    swap_query_and_key,
    swap_blocks,
    transpose_a_matrix,
    transpose_position_grid,
    perturb_one_weight,
    enlarge_a_matrix,
)
MUTATIONS: Mapping[str, tuple[Mutation, ...]] = {
    "vit": (*TRANSFORMER, tanh_gelu, other_eps),
    "pe_lang": (*TRANSFORMER, rope_off),
    "convnext": (
        swap_stage_blocks,
        forget_a_layer_scale,
        forget_the_projections_bias,
        perturb_one_weight,
        enlarge_a_matrix,
    ),
    "dinov2": (*TRANSFORMER, registers_at_initialisation),
    "aimv2": (*TRANSFORMER, swap_gate_and_up),
}
"""By the module of the family. The mean of patches in place of the CLS token is a fault of outputs, not of the
network: see `mean_of_patches`."""


def mean_of_patches(outputs: Mapping[str, Array], prefix: int) -> dict[str, Array]:
    """The embedding as timm's default pooling makes it."""
    return {**outputs, "embedding": outputs["tokens"][:, prefix:].mean(axis=1)}


def on_network(mutation: Mutation) -> Mutation:
    """The mutation of a module that gives an encoder's outputs."""

    @functools.wraps(mutation)
    def mutate(module: Any) -> None:
        while not hasattr(module, "network"):  # what casts, or normalises pixels, stands around it
            module = module.encoder
        mutation(module.network)

    return mutate


@contextmanager
def changed_before_the_freezing(change: Mutation, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Exports whose module changes when all that is known of it was measured, which the real gate must notice."""
    freezers = {name: getattr(pipeline, name) for name in ("_freeze_torchscript", "_freeze_onnx")}
    changed: list[nn.Module] = []

    def changing(freeze: Any) -> Any:
        def freeze_changed(plan: Any, module: nn.Module, *more: Any) -> Any:
            if not changed:
                changed.append(module)
                with torch.no_grad():
                    change(module)
            return freeze(plan, module, *more)

        return freeze_changed

    with patch.context() as context:
        for name, freeze in freezers.items():
            context.setattr(pipeline, name, changing(freeze))
        yield
