"""`--weights`: a path, `hf:ID[@REVISION]`, `ms:ID[@REVISION]`, `random:SEED`, or nothing for the hub's own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from npu_export.checkpoint import Checkpoint, open_checkpoint
from npu_export.encoders.spec import EncoderSpec
from npu_export.hub import HUGGING_FACE, Hub, fetch_checkpoint
from npu_export.keymap import source_shapes
from npu_export.modelscope import MODELSCOPE
from npu_export.network import layouts_named, network_shapes
from npu_export.random_weights import parse_seed, seeded_tensor
from npu_runtime.errors import UsageError
from npu_runtime.steps import Steps

if TYPE_CHECKING:
    import torch

HUBS: tuple[Hub, ...] = (HUGGING_FACE, MODELSCOPE)


def find_weights(
    encoder: EncoderSpec, weights: str | None, layout: str = "auto", watch: Steps | None = None
) -> Checkpoint:
    """The checkpoint that `weights` names; without it, the encoder's own on the hub.

    `layout` matters for random weights alone: it is the one whose keys they have. `watch` is told of what is
    fetched. Raises CheckpointError
    where the checkpoint cannot be had or read, UsageError for a seed that is no
    number or an unknown layout.
    """
    names = encoder.published.weight_files
    if weights is None:
        return fetch_checkpoint(HUGGING_FACE, encoder.published.hub_id, names=names, watch=watch)
    scheme, _, rest = weights.partition(":")
    if scheme == "random":
        return random_checkpoint(encoder, rest, layout)
    for hub in HUBS:
        if scheme == hub.scheme:
            path, _, revision = rest.partition("@")
            owner, _, name = path.partition("/")
            name, _, file = name.partition("/")
            return fetch_checkpoint(hub, f"{owner}/{name}", revision or None, names, file, watch)
    return open_checkpoint(Path(weights), names=names)


def is_remote(source: str) -> bool:
    """Whether a checkpoint's source names a hub, not a path."""
    return source.startswith(tuple(f"{hub.scheme}:" for hub in HUBS))


def random_checkpoint(encoder: EncoderSpec, digits: str, layout_name: str = "auto") -> Checkpoint:
    """Seeded random weights under the keys of a layout, the encoder's first for auto, made as they are read."""
    seed = parse_seed(digits)
    if seed is None:
        raise UsageError("random weights need a seed", expected="random:SEED, such as random:0", got=f"random:{digits}")
    layout = layouts_named(encoder, layout_name)[0]
    shapes = source_shapes(layout.rules, network_shapes(layout))

    def read(name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(seeded_tensor(name, shapes[name], seed))

    dtypes = dict.fromkeys(shapes, "float32")
    return Checkpoint(f"random:{seed}", (), seed, shapes, dtypes, lambda: contextlib.nullcontext(read))
