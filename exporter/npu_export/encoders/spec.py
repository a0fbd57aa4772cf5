"""What the registry knows of an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from npu_export.keymap import Drop, Rule
from npu_runtime.artifact.schema import Preprocessing, TensorSpec, input_spec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Positions:
    """How a publisher resamples its learned positions when the image has another size."""

    target: str
    """The network's tensor of positions, [1, prefix + N, D]."""
    prefix: int
    """Positions at the front that belong to no patch, in the network's tensor."""
    mode: Literal["bilinear", "bicubic"]
    antialias: bool
    align_corners: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A way in which checkpoints of an encoder name and shape their tensors.

    Several may share a name, where a publisher's files differ in names alone.
    """

    name: str
    rules: tuple[Rule | Drop, ...]
    build: Callable[[], nn.Module]
    """The network as this layout's publisher defines it, in eval mode, computed buffers filled."""
    about: str
    """Whose files these are, in a few words."""
    prefix: str = ""
    """A prefix of this layout's own, with which the keys come, or without."""
    beside: tuple[Drop, ...] = ()
    """Keys that may lie beside a tower that has a prefix: a head, a text tower."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Settings that shapes do not show, by their name in the publisher's config.json."""
    positions: Positions | None = None
    """None where the publisher does not resample positions, or has none."""


@dataclass(frozen=True, slots=True)
class Lookalike:
    """A key of another model, left over or misshapen in this encoder's plan, and what it tells."""

    key: str
    """A template, as in rules, without any prefix."""
    shape: tuple[int, ...] | None
    """The shape that it must have; None for any."""
    text: str


@dataclass(frozen=True, slots=True)
class Published:
    """What is known of an encoder's publication, whatever the size of the images."""

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    parameters: int
    """Elements of all parameters at the published image size, heads that are not used left out."""
    lookalikes: tuple[Lookalike, ...] = ()
    weight_files: tuple[str, ...] = ()
    """Names of weights files on the hub beside the usual ones."""


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A vision network, its published weights and what is frozen of it, for images of one size."""

    published: Published
    image_size: int
    """Height and width in pixels."""
    stride: int
    """Image sizes are multiples of this: the patch, or the stride of the last stage."""
    outputs: tuple[TensorSpec, ...]
    with_outputs: Callable[[nn.Module], nn.Module]
    """The network as a module from `inputs` to a tuple of `outputs`, in their order; it keeps the
    network itself as its attribute `network`."""
    layouts: tuple[Layout, ...]
    """The first is the one that the hub's own file has."""
    preprocessing: tuple[Preprocessing, ...]
    """How publishers of these weights prepare images, one each; the first holds where nothing else is asked for."""
    at_size: Callable[[int], EncoderSpec]
    """The same encoder for images of another size."""

    @property
    def name(self) -> str:
        return self.published.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """RGB images, normalised, which the network itself takes whatever a program does."""
        return (input_spec("float32", (self.image_size, self.image_size)),)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that users know it by, its hub id first."""
        return (self.published.hub_id, *self.published.aliases)

    def layout_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layout.name for layout in self.layouts))
