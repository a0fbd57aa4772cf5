"""Fixtures of the exporter's tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def state(tiny_checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of the tiny checkpoint by their keys in its file. Not to be changed."""
    return load_file(tiny_checkpoint / "model.safetensors")
