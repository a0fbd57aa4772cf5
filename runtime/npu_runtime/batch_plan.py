"""Which frozen batch sizes run any number of images."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1024)
def plan_batches(count: int, batches: tuple[int, ...]) -> tuple[int, ...]:
    """Batch sizes to run, largest first, whose sum is at least `count` with the least padding.

    Of the plans with the least padding the one with the fewest runs is taken. Only the last run is
    padded: padding as large as the smallest run would make that run unnecessary.
    """
    largest = max(batches)
    # A best plan exists with fewer than `largest` runs of smaller sizes: of any `largest` of them,
    # some add up to a multiple of `largest` and can be replaced by fewer runs. So all images beyond
    # largest * largest go through the largest size, and the search below stays small.
    bulk = max(0, (count - largest * largest) // largest)
    rest = count - bulk * largest
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # images -> padding, runs, size of the last run
    for images in range(1, rest + 1):
        best.append(
            min((size - images, 1, -size) if size >= images else _extend(best[images - size], size) for size in batches)
        )
    plan = [largest] * bulk
    while rest > 0:
        size = -best[rest][2]
        plan.append(size)
        rest -= size
    return tuple(sorted(plan, reverse=True))


def _extend(best: tuple[int, int, int], size: int) -> tuple[int, int, int]:
    padding, runs, _ = best
    return padding, runs + 1, -size
