"""Modules that turn a timm network into the outputs of an encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _Outputs(nn.Module):
    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()


class ClsAndTokens(_Outputs):
    """The CLS token [B, D] and all tokens [B, N, D] after the final norm, in that order."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens: torch.Tensor = self.network.forward_features(pixel_values)
        return tokens[:, 0], tokens


class MeanAndTokens(_Outputs):
    """The mean of all tokens [B, D] and the tokens [B, N, D] after the final norm, in that order."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens: torch.Tensor = self.network.forward_features(pixel_values)
        return tokens.mean(dim=1), tokens


class OwnHead(_Outputs):
    """The output of the network's own head [B, D]."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.network(pixel_values),)


class InPrecision(nn.Module):
    """A module of another floating-point type, from float32 inputs to float32 outputs."""

    def __init__(self, encoder: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtype = dtype
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(output.float() for output in self.encoder(pixel_values.to(self.dtype)))
