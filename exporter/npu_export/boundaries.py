"""The outputs of a network's blocks, and of what stands between them, as statistics taken while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.store import ProbeRecord
from npu_runtime.errors import Error
from npu_runtime.parity.scales import channel_scale
from npu_runtime.parity.sketch import Sketch, norm_rows, over_scale, sketch_rows

if TYPE_CHECKING:
    from torch import nn

Scale = npt.NDArray[np.float32]
BLOCKS, STAGES = "blocks", "stages"
"""Names of containers in timm's networks: of blocks, and of parts that have some each."""


def is_block(name: str) -> bool:
    """Whether a module of this name is a block: `blocks.5`, `stages.2.blocks.14`."""
    return name.split(".")[-2:-1] == [BLOCKS]


def boundary_names(names: Iterable[str]) -> list[str]:
    """Of the names of a network's modules those whose outputs are boundaries, in their order.

    These are its blocks, and what stands beside their containers: `patch_embed`, `stages.1.downsample`, `norm`.
    """
    return [name for name in names if is_block(name) or _stands_beside(name.split("."))]


def _stands_beside(parts: list[str]) -> bool:
    if len(parts) == 1:
        return parts[0] not in ("", BLOCKS, STAGES)
    return len(parts) == 3 and parts[0] == STAGES and parts[2] != BLOCKS


class BoundaryRecorder:
    """Statistics of each boundary's outputs, in the order in which the network computes them."""

    def __init__(self, modules: Iterable[str], scales: Mapping[str, Scale] | None = None) -> None:
        """Without `scales` each boundary's are those of the first image that it sees."""
        self.scales = dict(scales or {})
        """By which outputs are divided before anything is taken of them."""
        self._blocks = [name for name in modules if is_block(name)]
        self._rows: dict[str, list[tuple[Sketch, Sketch]]] = {}
        self.sizes: dict[str, int] = {}
        """Elements of an image's output."""

    def records(self, images: int) -> dict[str, ProbeRecord]:
        """The statistics of this many images, which is what each boundary must have seen.

        What gave no tensor, or another number of them, is left out; of a block that raises Error.
        """
        records = {
            name: ProbeRecord(
                np.concatenate([sketch for sketch, _ in rows]),
                np.concatenate([norm for _, norm in rows]),
                self.scales[name],
            )
            for name, rows in self._rows.items()
            if sum(len(norm) for _, norm in rows) == images
        }
        if not self._blocks or (lost := [name for name in self._blocks if name not in records]):
            raise Error(
                "the network's blocks cannot be recorded, so no fault could be found among them",
                expected=f"modules in containers named {BLOCKS} that each give one tensor for {images} images",
                got=f"not {', '.join(lost)}" if self._blocks else "no such module",
                hint="export without --probes",
            )
        return records

    def add(self, name: str, output: Any) -> None:
        """Take the statistics of an output [N, ...]."""
        tensor = output.detach()
        rows = (tensor if tensor.element_size() >= 4 else tensor.float()).numpy()
        if name not in self.scales:
            self.scales[name] = _scale_of(rows)
        rows = over_scale(rows, self.scales[name])
        self._rows.setdefault(name, []).append((sketch_rows(rows), norm_rows(rows)))
        self.sizes[name] = rows.shape[1]


@contextlib.contextmanager
def record_boundaries(network: nn.Module, scales: Mapping[str, Scale] | None = None) -> Iterator[BoundaryRecorder]:
    """A recorder of what the network gives at its boundaries while this is entered; it holds no tensor."""
    import torch

    modules = dict(network.named_modules())
    names = boundary_names(modules)
    recorder = BoundaryRecorder(names, scales)

    def recorded(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            same = any(output is given or _is_view(output, given) for given in inputs)
            if isinstance(output, torch.Tensor) and not same:  # such as Identity and dropout, which do nothing
                recorder.add(name, output)

        return hook

    handles = [modules[name].register_forward_hook(recorded(name)) for name in names]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _scale_of(rows: npt.NDArray[Any]) -> Scale:
    """The scale of each channel of outputs [N, D] or [N, T, D], [D], or of [N, C, H, W], [C, 1]; 1 for others."""
    if rows.ndim == 4:
        return channel_scale(np.moveaxis(rows, 1, -1))[:, None]
    return channel_scale(rows) if rows.ndim in (2, 3) else np.ones((), np.float32)


def _is_view(output: Any, given: Any) -> bool:
    """Whether two tensors are the same elements in the same shape."""
    import torch

    if not isinstance(output, torch.Tensor) or not isinstance(given, torch.Tensor):
        return False
    return output.data_ptr() == given.data_ptr() and output.shape == given.shape
