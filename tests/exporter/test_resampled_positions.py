"""Learned positions for images of another size: refused with advice, or resampled as each publisher does."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from checkpoints import of_state, seeded_state

import npu_export.encoders
from npu_export.encoders.spec import EncoderSpec
from npu_export.errors import CheckpointError
from npu_export.network import load_network, plan_weights
from npu_export.timm_import import import_timm

Resample = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(positions [1, prefix + before², D] of the published size, before, after) -> positions of the other size."""


@pytest.fixture(autouse=True)
def only_tiny_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal tries every encoder's layouts: leave out those of full size, for time."""
    monkeypatch.setattr(npu_export.encoders, "ENCODERS", tiny.FAMILIES)


def as_transformers_vit(positions: torch.Tensor, before: int, after: int) -> torch.Tensor:
    import_timm()
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    embeddings = ViTEmbeddings(ViTConfig(hidden_size=64, image_size=before * 8, patch_size=8))
    with torch.no_grad():
        embeddings.position_embeddings.copy_(positions)
        return embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + after**2, 64), after * 8, after * 8)


def as_transformers_dinov2(positions: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """With the position of the CLS token before those of the patches, which are returned alone."""
    import_timm()
    from transformers import Dinov2WithRegistersConfig
    from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings

    config = Dinov2WithRegistersConfig(hidden_size=64, image_size=before * 14, patch_size=14)
    embeddings = Dinov2WithRegistersEmbeddings(config)
    with torch.no_grad():
        embeddings.position_embeddings.copy_(positions)
        return embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + after**2, 64), after * 14, after * 14)[:, 1:]


def as_timm(prefix: int) -> Resample:
    def resample(positions: torch.Tensor, before: int, after: int) -> torch.Tensor:
        import_timm()
        from timm.layers import resample_abs_pos_embed

        return resample_abs_pos_embed(positions, [after, after], [before, before], num_prefix_tokens=prefix)

    return resample


def as_google(positions: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """scipy.ndimage.zoom(order=1): the corners of both grids lie upon each other."""
    return linear(positions, before, np.linspace(0, before - 1, after))


def as_meta(positions: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """torch's bilinear without align_corners: the edges of both grids do, and positions lie in mid-cell."""
    places = (np.arange(after) + 0.5) * before / after - 0.5
    return linear(positions, before, places.clip(0, before - 1))


def linear(positions: torch.Tensor, before: int, places: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
    """The grid at these places along both sides, by linear interpolation in float64; one position before it stays."""
    rows = positions.reshape(-1, positions.shape[-1]).double().numpy()
    grid = rows[1:].reshape(before, before, -1)
    for axis in (0, 1):
        grid = np.apply_along_axis(lambda line: np.interp(places, range(before), line), axis, grid)
    return torch.from_numpy(np.concatenate([rows[:1], grid.reshape(-1, grid.shape[-1])]))[None].float()


LAYOUTS = [
    pytest.param(encoder, index, key, resample, id=f"{encoder.name}-{encoder.layouts[index].name}-{index}")
    for encoder, index, key, resample in (
        (tiny.TINY, 0, "embeddings.position_embeddings", as_transformers_vit),
        (tiny.TINY, 1, "embeddings.position_embeddings", as_transformers_vit),
        (tiny.TINY, 2, "pos_embed", as_timm(1)),
        (tiny.TINY, 3, "Transformer/posembed_input/pos_embedding", as_google),
        (tiny.TINY, 4, "Transformer/posembed_input/pos_embedding", as_google),
        (tiny.TINY, 5, "pos_embedding", as_google),
        (tiny.TINY_PE_LANG, 0, "positional_embedding", as_meta),
        (tiny.TINY_PE_LANG, 1, "pos_embed", as_timm(1)),
        (tiny.TINY_DINOV2, 0, "pos_embed", as_timm(0)),
        (tiny.TINY_DINOV2, 1, "pos_embed", as_transformers_dinov2),
        (tiny.TINY_DINOV2, 2, "embeddings.position_embeddings", as_transformers_dinov2),
        (tiny.TINY_DINOV2, 3, "embeddings.position_embeddings", as_transformers_dinov2),
    )
]


def test_every_layout_with_positions_is_tried() -> None:
    with_positions = sum(layout.positions is not None for encoder in tiny.FAMILIES for layout in encoder.layouts)
    assert len(LAYOUTS) == with_positions


@pytest.mark.parametrize("patches", [2, 7])
@pytest.mark.parametrize(("encoder", "index", "key", "resample"), LAYOUTS)
def test_positions_are_resampled_as_their_publisher_does(
    encoder: EncoderSpec, index: int, key: str, resample: Resample, patches: int
) -> None:
    state = seeded_state(encoder, encoder.layouts[index])
    resized = encoder.at_size(patches * encoder.stride)
    plan = plan_weights(resized, of_state(state), resample=True)
    assert plan.layout.name == encoder.layouts[index].name
    assert "resample positions 4 x 4 to" in plan.keymap.transformed()["pos_embed"]
    loaded = load_network(plan).state_dict()["pos_embed"]
    torch.testing.assert_close(loaded, resample(state[key], 4, patches), rtol=0, atol=1e-6)
    others = {move for move in plan.keymap.moves if "pos_embed" not in move.targets}
    assert others < set(plan_weights(encoder, of_state(state)).keymap.moves)


@pytest.mark.parametrize("prefix", ["module.", "state_dict/visual."])
def test_positions_are_resampled_under_a_prefix_too(prefix: str) -> None:
    state = seeded_state(tiny.TINY_PE_LANG, tiny.TINY_PE_LANG.layouts[0])
    resized = tiny.TINY_PE_LANG.at_size(84)
    found = of_state({prefix + key: tensor for key, tensor in state.items()})
    loaded = load_network(plan_weights(resized, found, resample=True)).state_dict()
    torch.testing.assert_close(loaded["pos_embed"], as_meta(state["positional_embedding"], 4, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("encoder", "index", "key", "resample"), LAYOUTS)
def test_positions_of_another_size_are_refused_with_advice_unless_that_was_asked_for(
    encoder: EncoderSpec, index: int, key: str, resample: Resample
) -> None:
    resized = encoder.at_size(6 * encoder.stride)
    with pytest.raises(CheckpointError, match="does not fit") as raised:
        plan_weights(resized, of_state(seeded_state(encoder, encoder.layouts[index])))
    assert str(raised.value.got).startswith("mismatched  pos_embed expected [1, ")
    assert raised.value.hint == (
        f"its positions are for images of another size: --image-size {encoder.image_size} exports at the "
        f"checkpoint's own, --image-size {resized.image_size} resamples them"
    )


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("layout", tiny.TINY_AIMV2.layouts, ids=lambda layout: layout.about)
def test_positions_that_their_publisher_does_not_resample_are_refused(layout: object, resample: bool) -> None:
    state = seeded_state(tiny.TINY_AIMV2, layout)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="does not fit") as raised:
        plan_weights(tiny.TINY_AIMV2.at_size(84), of_state(state), resample=resample)
    assert re.fullmatch(r"mismatched  pos_embed expected \[1, 36, 64\], got \[(1, )?16, 64\]", str(raised.value.got))
    assert "its publisher does not resample them: --image-size 56 exports" in str(raised.value.hint)


@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=lambda encoder: encoder.name)
def test_at_the_published_size_resampling_changes_nothing(encoder: EncoderSpec) -> None:
    for layout in encoder.layouts:
        found = of_state(seeded_state(encoder, layout))
        assert plan_weights(encoder, found, resample=True).keymap == plan_weights(encoder, found).keymap


def test_positions_of_no_square_grid_are_refused() -> None:
    state = seeded_state(tiny.TINY_DINOV2, tiny.TINY_DINOV2.layouts[0])
    state["pos_embed"] = state["pos_embed"][:, :15].contiguous()
    with pytest.raises(CheckpointError, match="does not fit") as raised:
        plan_weights(tiny.TINY_DINOV2, of_state(state), resample=True)
    assert raised.value.got == "mismatched  pos_embed expected [1, 16, 64], got [1, 15, 64]"


def test_a_network_without_positions_takes_its_checkpoint_at_any_size() -> None:
    found = of_state(seeded_state(tiny.TINY_CONVNEXT, tiny.TINY_CONVNEXT.layouts[0]))
    assert plan_weights(tiny.TINY_CONVNEXT.at_size(96), found).keymap.complete
