from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_runtime.batch_plan import plan_batches

BATCHES = st.sets(st.integers(1, 9), min_size=1, max_size=4).map(lambda sizes: tuple(sorted(sizes)))


def best_by_search(count: int, batches: tuple[int, ...]) -> tuple[int, int]:
    """Least padding, then fewest runs, over every multiset of sizes that just covers the images."""
    runs_of = [count // size + 1 for size in batches]
    return min(
        (total - count, sum(runs))
        for runs in itertools.product(*(range(most + 1) for most in runs_of))
        if (total := sum(n * size for n, size in zip(runs, batches))) >= count
    )


@given(st.integers(0, 40), BATCHES.filter(lambda sizes: len(sizes) <= 3))
def test_a_plan_has_the_least_padding_and_then_the_fewest_runs(count: int, batches: tuple[int, ...]) -> None:
    plan = plan_batches(count, batches)
    assert (sum(plan) - count, len(plan)) == best_by_search(count, batches)


@given(st.integers(0, 5000), BATCHES)
def test_a_plan_covers_the_images_largest_first_and_pads_only_the_last_run(
    count: int, batches: tuple[int, ...]
) -> None:
    plan = plan_batches(count, batches)
    assert set(plan) <= set(batches)
    assert list(plan) == sorted(plan, reverse=True)
    assert sum(plan) >= count
    assert not plan or sum(plan[:-1]) < count


@given(st.integers(82, 400), BATCHES)
def test_sending_the_bulk_through_the_largest_size_costs_nothing(count: int, batches: tuple[int, ...]) -> None:
    best: list[tuple[int, int]] = [(0, 0)]
    for images in range(1, count + 1):
        best.append(
            min(
                (size - images, 1) if size >= images else (best[images - size][0], best[images - size][1] + 1)
                for size in batches
            )
        )
    plan = plan_batches(count, batches)
    assert (sum(plan) - count, len(plan)) == best[count]


@pytest.mark.parametrize(
    ("count", "batches", "plan"),
    [
        (0, (1, 4), ()),
        (3, (1, 4), (1, 1, 1)),
        (9, (1, 4), (4, 4, 1)),
        (5, (4,), (4, 4)),
        (6, (3, 4), (3, 3)),
        (8, (1, 4, 6), (4, 4)),
    ],
)
def test_plans_that_a_reader_can_check(count: int, batches: tuple[int, ...], plan: tuple[int, ...]) -> None:
    assert plan_batches(count, batches) == plan


@pytest.mark.parametrize("batches", [(1,), (1, 4, 64), (7, 32), (6, 10, 15)])
def test_a_million_images_are_planned_quickly_and_mostly_at_the_largest_size(batches: tuple[int, ...]) -> None:
    start = time.perf_counter()
    plan = plan_batches(1_000_000, batches)
    assert time.perf_counter() - start < 2
    assert 0 <= sum(plan) - 1_000_000 < min(batches)
    assert plan.count(max(batches)) >= 1_000_000 // max(batches) - max(batches)
