from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_export.network import load_network, plan_weights, state_sha256
from npu_export.random_weights import seeded_tensor
from npu_export.weights import find_weights
from npu_runtime.errors import UsageError

NAMES = st.text(min_size=1, max_size=20)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
SEEDS = st.integers(0, 10**18 - 1)


@given(NAMES, SHAPES, SEEDS)
def test_a_seeded_tensor_depends_on_name_shape_and_seed_alone(name: str, shape: tuple[int, ...], seed: int) -> None:
    first = seeded_tensor(name, shape, seed)
    np.random.default_rng(seed).standard_normal(3)
    np.random.seed(1)
    assert np.array_equal(first, seeded_tensor(name, shape, seed))
    assert first.shape == shape
    assert first.dtype == np.float32


def test_seeded_tensors_are_the_same_on_every_machine() -> None:
    values = seeded_tensor("vit.layernorm.weight", (768,), 0)
    assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == "55f690ac9a4ea9d3"


def test_another_name_or_seed_gives_other_values() -> None:
    values = seeded_tensor("a.weight", (8, 8), 0)
    assert not np.array_equal(values, seeded_tensor("b.weight", (8, 8), 0))
    assert not np.array_equal(values, seeded_tensor("a.weight", (8, 8), 1))


@pytest.mark.parametrize(
    ("name", "shape", "mean", "deviation"),
    [
        ("norm.weight", (4096,), 1.0, 0.1),
        ("norm.bias", (4096,), 0.0, 0.1),
        ("cls_token", (1, 1, 4096), 0.0, 0.1),
        ("fc.weight", (64, 256), 0.0, 1 / 16),
        ("conv.weight", (64, 3, 16, 16), 0.0, 768**-0.5),
    ],
)
def test_no_seeded_tensor_hides_a_wrong_remap(name: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
    values = seeded_tensor(name, shape, 0)
    assert values.mean() == pytest.approx(mean, abs=0.05 * max(mean, deviation))
    assert values.std() == pytest.approx(deviation, rel=0.05)
    assert len(np.unique(values)) > values.size * 0.99


def test_random_weights_give_the_state_of_a_checkpoint_with_the_same_tensors(tiny_checkpoint: Path) -> None:
    digests = {
        state_sha256(load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, weights))))
        for weights in ("random:0", str(tiny_checkpoint))
    }
    assert len(digests) == 1
    other = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:1")))
    assert state_sha256(other) not in digests


def test_random_weights_say_their_seed() -> None:
    checkpoint = find_weights(tiny.TINY, "random:007")
    assert checkpoint.source == "random:7"
    assert checkpoint.random_seed == 7
    assert checkpoint.file is None
    name = "vit.layernorm.weight"
    assert torch.equal(checkpoint.read(name), torch.from_numpy(seeded_tensor(name, (64,), 7)))


@pytest.mark.parametrize("seed", ["", "-1", "1.5", "x", "1e3", "0x1", " 1", "٣", "1\n", "9" * 19])
def test_random_weights_without_a_seed_are_refused(seed: str) -> None:
    with pytest.raises(UsageError, match="need a seed"):
        find_weights(tiny.TINY, f"random:{seed}")


def test_the_longest_seed_is_accepted() -> None:
    assert find_weights(tiny.TINY, f"random:{'9' * 18}").random_seed == 10**18 - 1
