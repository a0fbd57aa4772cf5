from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from npu_export.operations import (
    COPY,
    Chain,
    Concatenate,
    FoldPosition,
    Operation,
    ResamplePositions,
    Reshape,
    Shape,
    Split,
    Transpose,
    Zeros,
    grid_size,
)
from npu_export.timm_import import import_timm

Case = tuple[Operation, tuple[Shape, ...]]

SIZES = st.integers(1, 5)
SHAPES = st.lists(SIZES, min_size=1, max_size=4).map(tuple)


def tensors_of(shapes: tuple[Shape, ...]) -> tuple[torch.Tensor, ...]:
    """Tensors in which no two elements are alike, within one or between two."""
    starts = [sum(math.prod(shape) for shape in shapes[:index]) for index in range(len(shapes))]
    return tuple(
        torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(shape)
        for start, shape in zip(starts, shapes)
    )


@st.composite
def concatenations(draw: st.DrawFn) -> Case:
    shape, parts = draw(SHAPES), draw(st.integers(1, 4))
    return Concatenate(parts, draw(st.integers(0, len(shape) - 1))), (shape,) * parts


@st.composite
def splits(draw: st.DrawFn) -> Case:
    operation, sources = draw(concatenations())
    split, targets = operation.inverse(), operation.target_shapes(sources)
    assert split is not None
    assert targets is not None
    return split, targets


@st.composite
def transposes(draw: st.DrawFn) -> Case:
    shape = draw(SHAPES)
    return Transpose(tuple(draw(st.permutations(range(len(shape)))))), (shape,)


@st.composite
def reshapes(draw: st.DrawFn) -> Case:
    """A dim of any size beside others that are joined or parted."""
    free, shape = draw(SIZES), draw(SHAPES)
    before, after = (-1, *shape), (draw(st.just(1)), -1, math.prod(shape))
    operation = Reshape(before, after)
    if draw(st.booleans()):
        return operation.inverse(), ((1, free, math.prod(shape)),)
    return operation, ((free, *shape),)


@st.composite
def chains(draw: st.DrawFn) -> Case:
    """What Google's files need: kernels of attention reshaped, transposed, then joined."""
    heads, head, parts = draw(SIZES), draw(SIZES), draw(st.integers(1, 3))
    width = heads * head
    steps = (Reshape((width, heads, head), (width, width)), Transpose((1, 0)), Concatenate(parts))
    return Chain(steps), ((width, heads, head),) * parts


CASES = st.one_of(
    st.lists(SHAPES, min_size=1, max_size=3).map(lambda shapes: (COPY, tuple(shapes))),
    concatenations(),
    splits(),
    transposes(),
    reshapes(),
    chains(),
)


@given(CASES)
def test_an_operation_with_an_inverse_leads_there_and_back_bit_for_bit(case: Case) -> None:
    operation, shapes = case
    tensors = tensors_of(shapes)
    there = operation.apply(tensors)
    inverse = operation.inverse()
    assert inverse is not None
    back = inverse.apply(there)
    assert len(back) == len(tensors)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors))
    assert inverse.target_shapes(tuple(tuple(t.shape) for t in there)) == shapes


@given(CASES)
def test_an_operation_knows_its_shapes_both_ways(case: Case) -> None:
    operation, sources = case
    targets = tuple(tuple(tensor.shape) for tensor in operation.apply(tensors_of(sources)))
    assert operation.target_shapes(sources) == targets
    assert operation.source_shapes(targets) == sources


@pytest.mark.parametrize(
    ("operation", "fitting", "others"),
    [
        (Concatenate(2), [(2, 4), (2, 4)], [[(1, 4), (3, 4)], [(2, 4), (2, 5)], [(2, 4), (2,)], [(), ()]]),
        (Concatenate(2, dim=1), [(2, 4), (2, 4)], [[(2,), (2,)]]),
        (Split(3), [(6, 2)], [[(7, 2)], [()]]),
        (Split(3, dim=1), [(2, 6)], [[(6,)], [(6, 2)]]),
        (Transpose((1, 0)), [(2, 3)], [[(2,)], [(2, 3, 4)]]),
        (Reshape((-1, 4), (1, -1, 4)), [(9, 4)], [[(9, 5)], [(1, 9, 4)], [(36,)]]),
        (Reshape((2, 3), (6,)), [(2, 3)], [[(3, 2)], [(6,)]]),
        (FoldPosition(), [(1, 1, 4), (1, 5, 4)], [[(1, 1, 4), (1, 5, 3)], [(1, 4), (1, 5, 4)], [(1, 1, 4), (5, 4)]]),
        (FoldPosition(), [(1, 1, 4), (1, 5, 4)], [[(1, 1, 4), (2, 5, 4)], [(1, 2, 4), (1, 5, 4)]]),
        (ResamplePositions(1, 2, 3, "bicubic", True), [(1, 5, 4)], [[(1, 4, 4)], [(5, 4)], [(1, 10, 4)]]),
        (Chain((Transpose((1, 0)), Concatenate(2))), [(2, 3)] * 2, [[(2,), (2,)], [(2, 3), (3, 2)]]),
    ],
)
def test_shapes_that_do_not_fit_give_none_and_those_that_do_give_shapes(
    operation: Operation, fitting: list[Shape], others: list[list[Shape]]
) -> None:
    assert operation.target_shapes(fitting) == tuple(
        tuple(t.shape) for t in operation.apply(tensors_of(tuple(fitting)))
    )
    assert [operation.target_shapes(shapes) for shapes in others] == [None] * len(others)


@pytest.mark.parametrize(
    ("operation", "targets"),
    [
        (Split(2), [(2, 3), (3, 3)]),
        (Transpose((1, 0)), [(2, 3, 4)]),
        (Reshape((-1, 4), (1, -1, 4)), [(2, 3, 4)]),
        (ResamplePositions(1, 2, 3, "bicubic", True), [(1, 5, 4)]),
    ],
)
def test_targets_that_an_operation_cannot_give_are_an_error(operation: Operation, targets: list[Shape]) -> None:
    with pytest.raises(ValueError, match=r"unequal|dims|are not|are no positions"):
        operation.source_shapes(targets)


def test_folding_a_position_adds_it_to_the_cls_token_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    cls, positions = torch.randn(1, 1, 8, generator=generator), torch.randn(1, 10, 8, generator=generator)
    folded, patches = FoldPosition().apply((cls, positions))
    assert torch.equal(folded[0, 0], cls[0, 0] + positions[0, 0])
    assert torch.equal(patches, positions[:, 1:])
    assert FoldPosition().source_shapes([(1, 1, 8), (1, 9, 8)]) == ((1, 1, 8), (1, 10, 8))


@pytest.mark.parametrize(
    "operation",
    [FoldPosition(), ResamplePositions(1, 2, 3, "bilinear", False), Chain((COPY, FoldPosition()))],
    ids=str,
)
def test_what_loses_information_has_no_inverse(operation: Operation) -> None:
    assert operation.inverse() is None
    assert Chain((COPY, Transpose((1, 0)))).inverse() is not None


@given(SHAPES)
def test_zeros_come_from_nothing_and_go_back_only_as_zeros(shape: Shape) -> None:
    zeros = Zeros(shape)
    (made,) = zeros.apply(())
    assert torch.equal(made, torch.zeros(shape))
    assert zeros.target_shapes(()) == (shape,)
    assert zeros.source_shapes([shape]) == ()
    check = zeros.inverse()
    assert check.inverse() == zeros
    assert check.apply((made,)) == ()
    assert check.target_shapes([shape]) == ()
    assert check.source_shapes(()) == (shape,)
    assert check.target_shapes([(*shape, 1)]) is None
    made.view(-1)[-1] = -1e-30
    with pytest.raises(ValueError, match="must be zero"):
        check.apply((made,))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("mode", "antialias"), [("bilinear", False), ("bicubic", False), ("bicubic", True)])
@pytest.mark.parametrize(("prefix", "before", "after"), [(0, 4, 6), (1, 6, 4), (5, 4, 9), (1, 4, 4)])
def test_positions_are_resampled_as_images_of_their_grid(
    prefix: int, before: int, after: int, mode: str, antialias: bool, align_corners: bool
) -> None:
    positions = torch.randn(1, prefix + before**2, 8, generator=torch.Generator().manual_seed(0))
    other = torch.ones(2)
    operation = ResamplePositions(prefix, before, after, mode, antialias, align_corners)  # type: ignore[arg-type]
    kept, got = operation.apply((other, positions))
    assert kept is other
    assert torch.equal(got[:, :prefix], positions[:, :prefix])
    image = torch.stack([positions[0, prefix + row * before :][:before] for row in range(before)])  # [row, column, D]
    expected = F.interpolate(
        image.movedim(-1, 0)[None], size=(after, after), mode=mode, antialias=antialias, align_corners=align_corners
    )
    for row in range(after):
        for column in range(after):
            torch.testing.assert_close(got[0, prefix + row * after + column], expected[0, :, row, column])
    assert operation.target_shapes([(2,), tuple(positions.shape)]) == ((2,), tuple(got.shape))
    assert operation.source_shapes([(2,), tuple(got.shape)]) == ((2,), tuple(positions.shape))


@pytest.mark.parametrize(("before", "after"), [(4, 6), (6, 4), (7, 3)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_bicubic_antialiased_positions_are_those_of_timm(prefix: int, before: int, after: int) -> None:
    import_timm()
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, prefix + before**2, 8, generator=torch.Generator().manual_seed(0))
    (got,) = ResamplePositions(prefix, before, after, "bicubic", antialias=True).apply((positions,))
    assert torch.equal(got, resample_abs_pos_embed(positions, [after, after], num_prefix_tokens=prefix))
    (other,) = ResamplePositions(prefix, before, after, "bicubic", antialias=False).apply((positions,))
    assert not torch.allclose(other, got, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_in_half_precision_are_resampled_in_single_and_keep_their_dtype(dtype: torch.dtype) -> None:
    positions = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    operation = ResamplePositions(1, 4, 6, "bicubic", antialias=True)
    (got,) = operation.apply((positions,))
    assert got.dtype == dtype
    assert torch.equal(got, operation.apply((positions.float(),))[0].to(dtype))


@pytest.mark.parametrize(("patches", "side"), [(0, 0), (1, 1), (2, None), (196, 14), (197, None), (-1, None)])
def test_a_grid_is_a_whole_square(patches: int, side: int | None) -> None:
    assert grid_size(patches) == side


def test_operations_name_themselves_in_reports() -> None:
    resample = ResamplePositions(1, 14, 24, "bicubic", antialias=True)
    assert str(Chain((COPY, resample))) == "resample positions 14 x 14 to 24 x 24 (bicubic, antialiased)"
    assert str(Chain((Reshape((4, 2, 2), (4, 4)), Transpose((1, 0)), Concatenate(3)))) == (
        "reshape, transpose, concatenate 3"
    )
