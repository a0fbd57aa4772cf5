"""Build an encoder's network and fill it from a checkpoint: all of it, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_export import encoders
from npu_export.checkpoint import Checkpoint
from npu_export.encoders.spec import EncoderSpec, Layout
from npu_export.errors import CheckpointError
from npu_export.key_folding import fold_keys
from npu_export.keymap import KeymapPlan, Mismatch, Shapes, read_mapped
from npu_export.operations import COPY, grid_size
from npu_export.recognise import Candidate, candidates, duplicates, lookalikes, nearest
from npu_runtime.artifact.schema import Coverage
from npu_runtime.errors import UsageError
from npu_runtime.steps import BYTES, Silent, Steps

if TYPE_CHECKING:
    import torch
    from torch import nn

POSITIONS = "pos_embed"
"""The tensor of positions in timm's networks."""
FLOATING = ("float32", "float16", "bfloat16")
"""Dtypes in which weights are published; others are refused rather than cast."""


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """How a checkpoint fills a network. Complete: every key is used once or dropped, every target filled."""

    encoder: EncoderSpec
    layout: Layout
    prefix: str
    """Before the layout's keys in the file, containers and their slashes included."""
    checkpoint: Checkpoint
    keymap: KeymapPlan
    parameters: int
    """Elements of all tensors that the network receives."""
    why: str
    """How the layout was chosen."""

    def coverage(self) -> Coverage:
        matched = sum(len(m.sources) for m in self.keymap.moves if m.rule.operation == COPY)
        return Coverage(matched, len(self.keymap.sources()) - matched, len(self.keymap.dropped), self.parameters)


def plan_weights(
    encoder: EncoderSpec,
    checkpoint: Checkpoint,
    layout: str = "auto",
    *,
    prefix: str | None = None,
    resample: bool = False,
) -> WeightsPlan:
    """The layout whose rules use the whole checkpoint and fill the whole network.

    Reads names, shapes and dtypes only. `prefix` insists on the part of the file that has it; `resample`
    allows positions of another image size. Raises CheckpointError with every fault, folded by layer, where
    no layout does, where several do, or where the checkpoint's config.json describes another network.
    """
    _check_prefix(prefix, checkpoint)
    target = network_shapes(encoder.layouts[0])
    found = candidates(layouts_named(encoder, layout), checkpoint.shapes, target, prefix=prefix, resample=resample)
    complete = [candidate for candidate in found if candidate.keymap.complete]
    towers = complete or [candidate for candidate in found if candidate.fills]
    if len(towers) > 1:
        raise CheckpointError(
            f"the checkpoint holds {encoder.name} more than once",
            where=checkpoint.source,
            expected="one network that fits",
            got="\n".join(str(candidate) for candidate in towers),
            hint="choose one with --prefix, or with --layout where only the layouts differ",
        )
    if not complete:
        raise _does_not_fit(encoder, checkpoint, nearest(found), target)
    (chosen,) = complete
    used = chosen.keymap.sources()
    why = f"{len(used)} of {len(checkpoint.shapes)} keys are those of {chosen}"
    plan = WeightsPlan(
        encoder,
        chosen.layout,
        chosen.prefix,
        checkpoint,
        chosen.keymap,
        sum(math.prod(shape) for shape in target.values()),
        f"{why}, {len(chosen.keymap.dropped)} dropped" if chosen.keymap.dropped else why,
    )
    _check_dtypes(plan)
    _check_config(plan)
    return plan


def layouts_named(encoder: EncoderSpec, name: str) -> list[Layout]:
    """The encoder's layouts of this name, all for auto. Raises UsageError with the choices where there is none."""
    layouts = [known for known in encoder.layouts if name in ("auto", known.name)]
    if not layouts:
        choices = ", ".join(["auto", *encoder.layout_names()])
        raise UsageError(f"unknown layout {name!r} of {encoder.name}", expected=choices)
    return layouts


def load_network(plan: WeightsPlan, watch: Steps | None = None) -> nn.Module:
    """The network in fp32 and eval mode, every parameter and buffer from the checkpoint.

    Built without initialising weights; each tensor is copied once out of the mapped file. Raises
    CheckpointError for NaN and infinite values.
    """
    import torch

    network = _build_without_weights(plan.layout)
    state: dict[str, torch.Tensor] = {}
    nonfinite: dict[str, str] = {}
    advance = (watch or Silent()).count(4 * plan.parameters, BYTES)
    with plan.checkpoint.tensors() as read:
        stored: set[int] = set()

        def read_fp32(key: str) -> torch.Tensor:
            tensor = read(key)
            stored.add(tensor.untyped_storage().data_ptr())
            return tensor.to(torch.float32)

        for name, tensor in read_mapped(plan.keymap, read_fp32):
            # What an operation made is kept as it is: a copy more of each would leave holes in the heap.
            storage = tensor.untyped_storage()
            own = storage.data_ptr() not in stored and storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
            state[name] = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
            if not tensor.isfinite().all():
                nonfinite[name] = str(list(tensor.shape))
            advance(tensor.nbytes)
    if nonfinite:
        raise CheckpointError(
            "the checkpoint holds NaN or infinite weights",
            where=plan.checkpoint.source,
            expected="finite values",
            got="\n".join(fold_keys(nonfinite)),
            hint="the file is damaged, or the training diverged; use another checkpoint",
        )
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False)


def state_sha256(network: nn.Module) -> str:
    """sha256 over the state dict in order of name: name, dtype, shape, then the bytes of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def network_shapes(layout: Layout) -> Shapes:
    """Names and shapes of the parameters and buffers that a checkpoint must fill; all layouts have the same."""
    return {name: tuple(tensor.shape) for name, tensor in _build_without_weights(layout).state_dict().items()}


def _build_without_weights(layout: Layout) -> nn.Module:
    """The network with parameters on the meta device, and buffers that it computes itself filled as ever."""
    with _parameters_on_meta():
        return layout.build()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as modules take them, so that initialising them costs nothing.

    A build under `torch.device("meta")` would leave computed buffers, such as rotary positions, empty.
    """
    import torch
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)

    # torch's annotation says that a hook returns nothing; its documentation, that what it returns is registered.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _does_not_fit(
    encoder: EncoderSpec, checkpoint: Checkpoint, candidate: Candidate, target: Shapes
) -> CheckpointError:
    """The error with every fault, and what the file seems to be instead."""
    twice = {key: f"names what {other} fills" for key, other in duplicates(candidate).items()}
    faults = [*candidate.keymap.faults(), *(f"duplicate   {line}" for line in fold_keys(twice))]
    told = lookalikes(encoder, candidate)
    mismatched = {mismatch.target: mismatch for mismatch in candidate.keymap.mismatched}
    if (other := _other_encoder(encoder, checkpoint, _filled(candidate, target))) is not None:
        hint = f"this looks like a checkpoint of {other}: use --model {other}"
    elif told:
        hint = f"this is another model: it has {'; '.join(told)}"
    elif set(mismatched) == {POSITIONS}:
        hint = _positions_hint(encoder, candidate, mismatched[POSITIONS])
    elif twice:
        hint = "the keys differ in their prefix alone: choose the part to use with --prefix"
    else:
        hint = "check that this is the encoder's own checkpoint, whole, in a layout that npu-export --list names"
    return CheckpointError(
        f"the checkpoint does not fit {encoder.name}",
        where=f"{checkpoint.source}, read as {candidate}",
        expected="every tensor used once or dropped by a rule, every parameter filled, every shape equal",
        got="\n".join(faults),
        hint=hint,
    )


def _positions_hint(encoder: EncoderSpec, candidate: Candidate, mismatch: Mismatch) -> str:
    tokens = max(shape[-2] for shape in mismatch.got if len(shape) >= 2)
    side = next((side for n in (0, 1) if (side := grid_size(tokens - n))), None)
    own = (
        f"--image-size {side * encoder.stride} exports at the checkpoint's own" if side else "--image-size asks for it"
    )
    if candidate.layout.positions is None:
        return f"its positions are for images of another size, and its publisher does not resample them: {own}"
    return f"its positions are for images of another size: {own}, --image-size {encoder.image_size} resamples them"


def _other_encoder(encoder: EncoderSpec, checkpoint: Checkpoint, filled: float) -> str | None:
    """Name of another encoder that the keys and shapes fill better, and for the most part."""
    best, name = max(filled, 0.5), None
    for other in encoders.ENCODERS:
        if other.name != encoder.name:
            target = network_shapes(other.layouts[0])
            by_other = _filled(nearest(candidates(other.layouts, checkpoint.shapes, target)), target)
            if by_other > best:
                best, name = by_other, other.name
    return name


def _filled(candidate: Candidate, target: Shapes) -> float:
    """The fraction of the network's tensors that the candidate fills."""
    keymap = candidate.keymap
    return (sum(len(move.targets) for move in keymap.moves) - len(keymap.mismatched)) / len(target)


def _check_prefix(prefix: str | None, checkpoint: Checkpoint) -> None:
    if prefix is not None and ("{" in prefix or "}" in prefix):
        raise UsageError("a prefix has no braces", got=prefix)
    if prefix is not None and not any(key.startswith(prefix) for key in checkpoint.shapes):
        starts = dict.fromkeys(re.split(r"(?<=[./])", key)[0] for key in checkpoint.shapes)
        raise CheckpointError(
            f"no key of the checkpoint starts with {prefix!r}",
            where=checkpoint.source,
            expected="the start of some keys, such as visual. or model_ema/",
            got=f"keys that start with {', '.join(list(starts)[:8])}{', …' if len(starts) > 8 else ''}",
        )


def _check_dtypes(plan: WeightsPlan) -> None:
    dtypes = {key: plan.checkpoint.dtypes[key] for key in plan.keymap.sources()}
    wrong = {key: dtype for key, dtype in dtypes.items() if dtype not in FLOATING}
    if wrong:
        raise CheckpointError(
            "the checkpoint holds weights of other dtypes",
            where=plan.checkpoint.source,
            expected=", ".join(FLOATING),
            got="\n".join(fold_keys(wrong)),
            hint="convert the checkpoint to float32 first, and see that nothing is lost",
        )


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
