"""`--weights`: a path, `hf:ID[@REVISION]`, `random:SEED`, or nothing for the hub's own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from npu_export.checkpoint import Checkpoint, open_checkpoint
from npu_export.encoders.spec import EncoderSpec
from npu_export.hub import fetch_checkpoint
from npu_export.keymap import source_shapes
from npu_export.network import network_shapes
from npu_export.random_weights import parse_seed, seeded_tensor
from npu_runtime.errors import UsageError

if TYPE_CHECKING:
    import torch


def find_weights(encoder: EncoderSpec, weights: str | None) -> Checkpoint:
    """The checkpoint that `weights` names; without it, the encoder's own on the hub.

    Raises CheckpointError where it cannot be had or read, UsageError for a seed that is no number.
    """
    if weights is None:
        return fetch_checkpoint(encoder.hub_id)
    scheme, _, rest = weights.partition(":")
    if scheme == "random":
        return random_checkpoint(encoder, rest)
    if scheme == "hf":
        repository, _, revision = rest.partition("@")
        return fetch_checkpoint(repository, revision or None)
    return open_checkpoint(Path(weights))


def random_checkpoint(encoder: EncoderSpec, digits: str) -> Checkpoint:
    """Seeded random weights under the keys of the encoder's first layout, made as they are read."""
    seed = parse_seed(digits)
    if seed is None:
        raise UsageError("random weights need a seed", expected="random:SEED, such as random:0", got=f"random:{digits}")
    layout = encoder.layouts[0]
    shapes = source_shapes(layout.rules, network_shapes(layout))

    def read(name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(seeded_tensor(name, shapes[name], seed))

    return Checkpoint(f"random:{seed}", None, seed, shapes, lambda: contextlib.nullcontext(read))
