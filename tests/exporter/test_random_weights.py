from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_export.encoders.spec import EncoderSpec
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
        ("attn.in_proj_weight", (192, 64), 0.0, 1 / 8),
        ("attn.in_proj_bias", (4096,), 0.0, 0.1),
        ("stages.0.blocks.1.gamma", (4096,), 0.25, 0.1),
        ("blocks.0.gamma_2", (4096,), 0.25, 0.1),
        ("layer_scale1.lambda1", (4096,), 0.25, 0.1),
        ("Transformer/encoder_norm/scale", (4096,), 1.0, 0.1),
        ("embedding/kernel", (16, 16, 3, 64), 0.0, 768**-0.5),
        ("MlpBlock_3/Dense_0/kernel", (64, 256), 0.0, 1 / 8),
        ("MultiHeadDotProductAttention_1/key/kernel", (64, 4, 16), 0.0, 1 / 8),
        ("MultiHeadDotProductAttention_1/out/kernel", (4, 16, 64), 0.0, 1 / 8),
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
    assert checkpoint.files == ()
    name = "layernorm.weight"
    assert torch.equal(checkpoint.read(name), torch.from_numpy(seeded_tensor(name, (64,), 7)))


@pytest.mark.parametrize(
    ("encoder", "layout"),
    [(encoder, layout) for encoder in tiny.FAMILIES for layout in encoder.layout_names()],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_random_weights_have_the_keys_of_the_layout_that_is_asked_for(encoder: EncoderSpec, layout: str) -> None:
    checkpoint = find_weights(encoder, "random:2", layout)
    plan = plan_weights(encoder, checkpoint)
    assert (plan.layout.name, plan.prefix, plan.keymap.dropped) == (layout, "", {})
    assert set(plan.keymap.sources()) == set(checkpoint.shapes)
    first = encoder.layout_names()[0]
    assert (set(find_weights(encoder, "random:2").shapes) == set(checkpoint.shapes)) == (layout == first)
    for name, shape in checkpoint.shapes.items():
        assert checkpoint.read(name).shape == shape


def test_random_weights_of_a_layout_that_does_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown layout 'meta' of tiny-vit") as raised:
        find_weights(tiny.TINY, "random:0", "meta")
    assert raised.value.expected == "auto, hf, timm, jax"


@pytest.mark.parametrize("seed", ["", "-1", "1.5", "x", "1e3", "0x1", " 1", "٣", "1\n", "9" * 19])
def test_random_weights_without_a_seed_are_refused(seed: str) -> None:
    with pytest.raises(UsageError, match="need a seed"):
        find_weights(tiny.TINY, f"random:{seed}")


def test_the_longest_seed_is_accepted() -> None:
    assert find_weights(tiny.TINY, f"random:{'9' * 18}").random_seed == 10**18 - 1
