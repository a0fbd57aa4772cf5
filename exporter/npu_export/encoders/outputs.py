"""Modules that turn a timm network into the outputs of an encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ClsAndTokens(nn.Module):
    """The CLS token [B, D] and all tokens [B, N, D] after the final norm, in that order."""

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens: torch.Tensor = self.network.forward_features(pixel_values)
        return tokens[:, 0], tokens
