"""Checkpoints that tests hold in memory: shapes alone, given tensors, or seeded tensors in a layout of an encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from npu_export.checkpoint import Checkpoint
from npu_export.encoders.spec import EncoderSpec, Layout
from npu_export.keymap import Shapes, source_shapes
from npu_export.network import network_shapes
from npu_export.random_weights import seeded_tensor

State = dict[str, torch.Tensor]

LAYOUT_LISTS = Path(__file__).parent / "data" / "layouts"


def published_shapes(name: str) -> Shapes:
    """Keys and shapes of a published file, from a list in tests/data/layouts."""
    lines = (line.split("\t") for line in (LAYOUT_LISTS / name).read_text("utf-8").splitlines())
    return {key: tuple(int(n) for n in dims.split(",") if n) for key, dims in lines}


def of_shapes(shapes: Shapes, dtype: str = "float32") -> Checkpoint:
    """A checkpoint for planning; reading a tensor of it is a KeyError."""
    return Checkpoint(
        "shapes", (), None, shapes, dict.fromkeys(shapes, dtype), lambda: contextlib.nullcontext({}.__getitem__)
    )


def of_state(state: Mapping[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint(
        "memory",
        (),
        None,
        {key: tuple(tensor.shape) for key, tensor in state.items()},
        {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in state.items()},
        lambda: contextlib.nullcontext(state.__getitem__),
    )


def seeded_state(encoder: EncoderSpec, layout: Layout) -> State:
    """Random tensors under every key that the layout's rules use."""
    shapes = source_shapes(layout.rules, network_shapes(layout))
    return {key: torch.from_numpy(seeded_tensor(key, shape, 0)) for key, shape in shapes.items()}


def under(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}
