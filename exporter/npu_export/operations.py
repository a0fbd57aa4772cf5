"""What a rule does to tensors on their way from a checkpoint to a network. Each knows its shapes both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


class Operation(Protocol):
    """From some tensors to some tensors; `str` of one names it in reports."""

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        """Shapes of the results; None where the shapes do not fit."""
        ...

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        """Shapes that the sources must have for results of these shapes."""
        ...

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]: ...

    def inverse(self) -> Operation | None:
        """The operation back; None where information is lost."""
        ...


@dataclass(frozen=True, slots=True)
class Copy:
    """Tensors as they are."""

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...]:
        return tuple(sources)

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        return tuple(targets)

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensors)

    def inverse(self) -> Operation:
        return self

    def __str__(self) -> str:
        return "copy"


COPY = Copy()


@dataclass(frozen=True, slots=True)
class Concatenate:
    """`parts` tensors of one shape, joined along `dim`."""

    parts: int
    dim: int = 0

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        first = sources[0]
        if any(shape != first for shape in sources) or self.dim >= len(first):
            return None
        return ((*first[: self.dim], first[self.dim] * self.parts, *first[self.dim + 1 :]),)

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        (target,) = targets
        part = (*target[: self.dim], target[self.dim] // self.parts, *target[self.dim + 1 :])
        return (part,) * self.parts

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        import torch

        return (torch.cat(tuple(tensors), dim=self.dim),)

    def inverse(self) -> Operation:
        return Split(self.parts, self.dim)

    def __str__(self) -> str:
        return f"concatenate {self.parts}"


@dataclass(frozen=True, slots=True)
class Split:
    """One tensor in `parts` equal pieces of `dim`."""

    parts: int
    dim: int = 0

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        (source,) = sources
        if self.dim >= len(source) or source[self.dim] % self.parts:
            return None
        return self.inverse().source_shapes(sources)

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        joined = self.inverse().target_shapes(targets)
        if joined is None:
            raise ValueError(f"unequal parts: {targets}")
        return joined

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        (tensor,) = tensors
        return tensor.tensor_split(self.parts, dim=self.dim)

    def inverse(self) -> Concatenate:
        return Concatenate(self.parts, self.dim)

    def __str__(self) -> str:
        return f"split {self.parts}"


@dataclass(frozen=True, slots=True)
class Transpose:
    """Each tensor with its dims in another order, as `torch.permute` spells it."""

    order: tuple[int, ...]

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        if any(len(shape) != len(self.order) for shape in sources):
            return None
        return tuple(tuple(shape[dim] for dim in self.order) for shape in sources)

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        shapes = self.inverse().target_shapes(targets)
        if shapes is None:
            raise ValueError(f"{targets} have other dims than {self.order}")
        return shapes

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.permute(self.order) for tensor in tensors)

    def inverse(self) -> Transpose:
        return Transpose(tuple(self.order.index(dim) for dim in range(len(self.order))))

    def __str__(self) -> str:
        return "transpose"


@dataclass(frozen=True, slots=True)
class Reshape:
    """Each tensor from one shape to another; one dim of both may be -1 and stand for any size."""

    before: Shape
    after: Shape

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        free = [_free_size(self.before, shape) for shape in sources]
        if None in free:
            return None
        return tuple(tuple(size if n == -1 else n for n in self.after) for size in free if size is not None)

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        shapes = self.inverse().target_shapes(targets)
        if shapes is None:
            raise ValueError(f"{targets} are not {self.after}")
        return shapes

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.reshape(self.after) for tensor in tensors)

    def inverse(self) -> Reshape:
        return Reshape(self.after, self.before)

    def __str__(self) -> str:
        return "reshape"


def _free_size(pattern: Shape, shape: Shape) -> int | None:
    """What -1 stands for, 1 where the pattern has none; None where the shape does not fit."""
    if len(pattern) != len(shape) or any(p not in (-1, n) for p, n in zip(pattern, shape)):
        return None
    return shape[pattern.index(-1)] if -1 in pattern else 1


@dataclass(frozen=True, slots=True)
class FoldPosition:
    """(cls_token [1, 1, D], positions [1, 1 + N, D]) to (cls_token + its position, positions [1, N, D]).

    The sum is what reaches the first block, so networks that keep no position for the CLS token hold it.
    """

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        cls, positions = sources
        if len(cls) != 3 or len(positions) != 3 or cls != (1, 1, positions[2]) or positions[0] != 1:
            return None
        return cls, (1, positions[1] - 1, positions[2])

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        cls, positions = targets
        return cls, (1, positions[1] + 1, positions[2])

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        cls, positions = tensors
        return cls + positions[:, :1], positions[:, 1:]

    def inverse(self) -> None:
        return None

    def __str__(self) -> str:
        return "fold pos_embed[:,0] into cls_token"


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros of a shape, from nothing: the bias of a layer that was published without one."""

    shape: Shape

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...]:
        return (self.shape,)

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        return ()

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        import torch

        return (torch.zeros(self.shape),)

    def inverse(self) -> Operation:
        return RequireZeros(self.shape)

    def __str__(self) -> str:
        return "zeros"


@dataclass(frozen=True, slots=True)
class RequireZeros:
    """Nothing, from a tensor that holds zeros alone; ValueError for any other."""

    shape: Shape

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        return () if tuple(sources) == (self.shape,) else None

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        return (self.shape,)

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if tensors[0].any():
            raise ValueError("a tensor that must be zero is not")
        return ()

    def inverse(self) -> Operation:
        return Zeros(self.shape)

    def __str__(self) -> str:
        return "require zeros"


@dataclass(frozen=True, slots=True)
class ResamplePositions:
    """The last tensor, positions [1, prefix + before², D], resampled to a grid of after² by interpolation.

    The other tensors, and the prefix of positions that belong to no patch, stay as they are.
    """

    prefix: int
    before: int
    after: int
    mode: Literal["bilinear", "bicubic"]
    antialias: bool
    align_corners: bool = False

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        return self._exchange(sources, self.before, self.after)

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        shapes = self._exchange(targets, self.after, self.before)
        if shapes is None:
            raise ValueError(f"{targets} are no positions of {self.after} x {self.after}")
        return shapes

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        import torch

        *others, positions = tensors
        prefix, patches = positions[:, : self.prefix], positions[:, self.prefix :]
        grid = patches.reshape(1, self.before, self.before, -1).permute(0, 3, 1, 2)
        resampled = torch.nn.functional.interpolate(
            grid.float(),
            size=(self.after, self.after),
            mode=self.mode,
            antialias=self.antialias,
            align_corners=self.align_corners,
        )
        return *others, torch.cat([prefix, resampled.flatten(2).mT.to(positions.dtype)], dim=1)

    def inverse(self) -> None:
        return None

    def _exchange(self, shapes: Sequence[Shape], before: int, after: int) -> tuple[Shape, ...] | None:
        *others, positions = shapes
        if len(positions) != 3 or positions[1] != self.prefix + before**2:
            return None
        return *others, (positions[0], self.prefix + after**2, positions[2])

    def __str__(self) -> str:
        how = f"{self.mode}{', antialiased' if self.antialias else ''}"
        return f"resample positions {self.before} x {self.before} to {self.after} x {self.after} ({how})"


@dataclass(frozen=True, slots=True)
class Chain:
    """Operations one after the other."""

    operations: tuple[Operation, ...]

    def target_shapes(self, sources: Sequence[Shape]) -> tuple[Shape, ...] | None:
        shapes: tuple[Shape, ...] | None = tuple(sources)
        for operation in self.operations:
            if shapes is not None:
                shapes = operation.target_shapes(shapes)
        return shapes

    def source_shapes(self, targets: Sequence[Shape]) -> tuple[Shape, ...]:
        shapes = tuple(targets)
        for operation in reversed(self.operations):
            shapes = operation.source_shapes(shapes)
        return shapes

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        result = tuple(tensors)
        for operation in self.operations:
            result = operation.apply(result)
        return result

    def inverse(self) -> Operation | None:
        inverses = [operation.inverse() for operation in self.operations]
        if None in inverses:
            return None
        return Chain(tuple(inverse for inverse in reversed(inverses) if inverse is not None))

    def __str__(self) -> str:
        return ", ".join(str(operation) for operation in self.operations if operation != COPY)


def grid_size(patches: int) -> int | None:
    """Side of a square grid of so many patches; None where there is none."""
    side = math.isqrt(max(patches, 0))
    return side if side**2 == patches else None
