"""Massive activations, as trained encoders have them, planted into the weights of seeded networks.

A hidden unit of an early block's MLP fires where it is to, and writes a large number into channels of the residual
stream: the mechanism that Sun et al. describe (Massive Activations in Large Language Models, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

FIRES, SILENT = 30.0, -6.0
"""What the hidden unit is given where it fires, and elsewhere: GELU(-6) is nothing, GELU(30) is 30."""


@dataclass(frozen=True, slots=True)
class Outliers:
    """How large, in how many channels, and in all tokens or in three."""

    value: float
    channels: int = 1
    few: bool = False

    def __str__(self) -> str:
        if not self.value:
            return "none"
        return f"{self.value:g} in {self.channels} of {'a few tokens' if self.few else 'all tokens'}"


NONE = Outliers(0)
OUTLIERS = (NONE, *(Outliers(value, n, few) for value in (100, 1000) for n in (1, 4) for few in (False, True)))


def plant(network: Any, outliers: Outliers, images: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Change the network so that its residual stream holds the outliers from an early block on, on these images."""
    if not outliers.value:
        return
    with torch.no_grad():
        block = _early_block(network)
        mlp, scale = block.mlp, _layer_scale(block)
        channels = torch.randperm(mlp.fc2.out_features, generator=torch.Generator().manual_seed(7))[: outliers.channels]
        if not outliers.few and mlp.fc2.bias is not None:
            mlp.fc2.bias[channels] = outliers.value / scale[channels]
            return
        given = _inputs_of(network, mlp, images)
        tokens = given.shape[1]
        fires = [0, tokens // 3, tokens // 2] if outliers.few else list(range(tokens))
        _let_a_unit_fire(mlp, given, fires)
        active = _inputs_of(network, mlp.fc2, images)[:, fires, 0].mean()
        mlp.fc2.weight[channels, 0] = outliers.value / scale[channels] / active


def _early_block(network: Any) -> Any:
    blocks = list(network.blocks) if hasattr(network, "blocks") else [b for s in network.stages for b in s.blocks]
    return blocks[min(3, len(blocks) // 2 - 1)]


def _layer_scale(block: Any) -> torch.Tensor:
    """What the MLP's result is multiplied by, [D]."""
    for holder, name in ((block, "gamma_2"), (block, "gamma"), (getattr(block, "ls2", None), "gamma")):
        if isinstance(gamma := getattr(holder, name, None), torch.Tensor):
            return gamma
    return torch.ones(block.mlp.fc2.out_features)


def _inputs_of(network: Any, module: nn.Module, images: np.ndarray[Any, np.dtype[np.float32]]) -> torch.Tensor:
    """What a module is given, [N, T, D]."""
    caught: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: caught.append(given[0].detach()))
    try:
        network.forward_features(torch.from_numpy(images))
    finally:
        handle.remove()
    return caught[0]


def _let_a_unit_fire(mlp: Any, given: torch.Tensor, tokens: list[int]) -> None:
    """Have the first hidden unit fire on these tokens of `given` [N, T, D], and on no other, by least squares."""
    wanted = torch.full(given.shape[:2], SILENT, dtype=torch.float64)
    weight = torch.ones_like(wanted)
    wanted[:, tokens] = FIRES
    weight[:, tokens] = (given.shape[1] - len(tokens)) / len(tokens) or 1.0
    first = mlp.fc1 if hasattr(mlp, "fc1") else mlp.fc1_g
    rows = given.flatten(0, 1).double()
    if first.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    gram = rows.T @ (rows * weight.reshape(-1, 1))
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solved = torch.linalg.solve(gram, rows.T @ (weight * wanted).reshape(-1)).float()
    first.weight[0] = solved[: given.shape[2]]
    if first.bias is not None:
        first.bias[0] = solved[-1]
    if hasattr(mlp, "fc1_x"):
        mlp.fc1_x.weight[0] = solved[: given.shape[2]] / FIRES
