"""Build an encoder's network and fill it from a checkpoint: all of it, or not at all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_export.checkpoint import Checkpoint
from npu_export.encoders.spec import EncoderSpec, Layout
from npu_export.errors import CheckpointError
from npu_export.keymap import KeymapPlan, Rename, plan_keymap, read_mapped
from npu_runtime.artifact.schema import Coverage
from npu_runtime.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """How a checkpoint fills a network. Complete: every key is used once or dropped, every target filled."""

    encoder: EncoderSpec
    layout: Layout
    checkpoint: Checkpoint
    keymap: KeymapPlan

    def coverage(self) -> Coverage:
        renamed = sum(len(m.sources) for m in self.keymap.moves if isinstance(m.rule, Rename))
        moved = sum(len(m.sources) for m in self.keymap.moves)
        return Coverage(renamed, moved - renamed, len(self.keymap.dropped), self.encoder.parameters)


def plan_weights(encoder: EncoderSpec, checkpoint: Checkpoint, layout: str = "auto") -> WeightsPlan:
    """The layout whose rules use the whole checkpoint and fill the whole network.

    Reads names and shapes only. Raises CheckpointError with every fault, folded by layer, where no
    layout does, or where the checkpoint's config.json describes another network.
    """
    known = {candidate.name: candidate for candidate in encoder.layouts}
    if layout != "auto" and layout not in known:
        raise UsageError(f"unknown layout {layout!r} of {encoder.name}", expected=", ".join(["auto", *known]))
    candidates = encoder.layouts if layout == "auto" else (known[layout],)
    plans = [
        WeightsPlan(encoder, c, checkpoint, plan_keymap(c.rules, checkpoint.shapes, network_shapes(c)))
        for c in candidates
    ]
    plan = max(plans, key=lambda p: (p.keymap.complete, len(p.keymap.moves)))
    if not plan.keymap.complete:
        raise CheckpointError(
            f"the checkpoint does not fit {encoder.name}",
            where=f"{checkpoint.source} (layout {plan.layout.name})",
            expected="every tensor used once or dropped by a rule, every parameter filled, every shape equal",
            got="\n".join(plan.keymap.faults()),
            hint="check that this is the encoder's own checkpoint, whole, in a layout that npu-export --list names",
        )
    _check_config(plan)
    return plan


def load_network(plan: WeightsPlan) -> nn.Module:
    """The network in fp32 and eval mode, every parameter and buffer from the checkpoint.

    Built without allocating or initialising weights; each tensor is copied once out of the mapped file.
    """
    import torch

    network = _build_on_meta(plan.layout)
    with plan.checkpoint.tensors() as read:
        state = {
            name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, tensor in read_mapped(plan.keymap, read)
        }
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False)


def state_sha256(network: nn.Module) -> str:
    """sha256 over the state dict in order of name: name, dtype, shape, then the bytes of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def network_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters and buffers that a checkpoint must fill."""
    return {name: tuple(tensor.shape) for name, tensor in _build_on_meta(layout).state_dict().items()}


def _build_on_meta(layout: Layout) -> nn.Module:
    import torch

    with torch.device("meta"):
        return layout.build()


def _check_config(plan: WeightsPlan) -> None:
    config = plan.checkpoint.config or {}
    wrong = [
        f"{name} = {config[name]!r}, not {value!r}"
        for name, value in plan.layout.config.items()
        if name in config and config[name] != value
    ]
    if wrong:
        raise CheckpointError(
            f"the config.json beside the weights describes another network than {plan.encoder.name}",
            where=plan.checkpoint.source,
            expected=", ".join(f"{name} = {value!r}" for name, value in plan.layout.config.items()),
            got="; ".join(wrong),
            hint="these settings show in no tensor's shape: use the checkpoint of this encoder",
        )
