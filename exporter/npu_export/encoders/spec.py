"""What the registry knows of an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_export.keymap import Rule
from npu_runtime.artifact.schema import Preprocessing, TensorSpec, Tolerance

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Layout:
    """A way in which checkpoints of an encoder name and shape their tensors."""

    name: str
    rules: tuple[Rule, ...]
    build: Callable[[], nn.Module]
    """The network as this layout's publisher defines it, in eval mode. Computed buffers are filled also
    where it is called under `torch.device("meta")`."""
    config: Mapping[str, object]
    """Settings that shapes do not show, by their name in the publisher's config.json."""


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A vision network, its published weights and what is frozen of it."""

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    parameters: int
    """Elements of all parameters, heads that the encoder does not use left out."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    with_outputs: Callable[[nn.Module], nn.Module]
    """The network as a module from `inputs` to a tuple of `outputs`, in their order; it keeps the
    network itself as its attribute `network`."""
    layouts: tuple[Layout, ...]
    preprocessing: Preprocessing
    tolerances: tuple[Tolerance, ...]
