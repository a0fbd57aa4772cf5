from __future__ import annotations

import math
from pathlib import Path

import torch

from npu_runtime.artifact.store import open_artifact
from npu_runtime.backends.replay import Limits, judge_replays, replay_limits

LIMITS = (Limits("embedding", 1e-3, 1e-2),)


def outputs(seed: int) -> list[torch.Tensor]:
    return [torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))]


PLAIN = [outputs(1), outputs(2)]


def test_equal_replays_differ_by_nothing_and_near_ones_by_their_largest_difference() -> None:
    assert judge_replays(PLAIN, PLAIN, LIMITS).max_abs_difference == 0.0
    near = [PLAIN[0], [PLAIN[1][0] + 5e-4]]
    verdict = judge_replays(near, PLAIN, LIMITS)
    assert (verdict.breach, math.isclose(verdict.max_abs_difference, 5e-4, rel_tol=1e-3)) == (None, True)


def test_outputs_of_the_input_before_are_told_whatever_the_tolerance() -> None:
    stale = [PLAIN[0], PLAIN[0]]
    wide = (Limits("embedding", 1e6, math.inf),)
    assert judge_replays(stale, PLAIN, LIMITS).breach
    told = judge_replays(stale, PLAIN, wide).breach
    assert told is not None
    assert told.startswith("embedding differs by ")


def test_a_difference_beyond_either_limit_is_told() -> None:
    apart = [PLAIN[0], [PLAIN[1][0] + 2e-3]]
    assert judge_replays(apart, PLAIN, LIMITS).breach == "embedding differs by 2.0e-03, limit 1.0e-03"
    relative = judge_replays(apart, PLAIN, (Limits("embedding", 1.0, 1e-4),)).breach
    assert relative is not None
    assert relative.endswith("of its norm, limit 1.0e-04")


def test_nan_is_equal_at_the_same_places_and_infinitely_far_anywhere_else() -> None:
    with_nan = [[outputs(1)[0].clone()], [outputs(2)[0].clone()]]
    with_nan[1][0][1, 3] = math.nan
    with_nan[1][0][0, 0] = math.inf
    assert judge_replays(with_nan, with_nan, LIMITS).max_abs_difference == 0.0
    assert judge_replays(with_nan, with_nan, LIMITS).breach is None
    for verdict in (judge_replays(with_nan, PLAIN, LIMITS), judge_replays(PLAIN, with_nan, LIMITS)):
        assert verdict.max_abs_difference == math.inf
        assert verdict.breach


def test_the_limits_are_the_outputs_own_tolerances_and_equality_where_there_are_none(tiny_artifact: Path) -> None:
    manifest = open_artifact(tiny_artifact).manifest
    limits = replay_limits(manifest, "npu")
    assert [limit.output for limit in limits] == ["embedding", "tokens"]
    by_metric = {(t.output, t.metric): t.limit for t in manifest.tolerances_on("npu")}
    assert limits[0].max_abs == by_metric["embedding", "max_abs_error"]
    assert limits[0].relative_l2 == by_metric["embedding", "max_relative_l2_error"]
    nothing = (Limits("embedding", 0.0, 0.0),)
    assert judge_replays(PLAIN, PLAIN, nothing).breach is None
    assert judge_replays([PLAIN[0], [PLAIN[1][0] + 1e-6]], PLAIN, nothing).breach
