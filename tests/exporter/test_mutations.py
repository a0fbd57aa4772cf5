"""The limits of each family tell a wrong network from a right one, in every precision and with massive channels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from gate import Gate, beyond, gate_of, largest_share
from mutations import MUTATIONS, Mutation, changed_before_the_freezing, mean_of_patches, on_network, tanh_gelu
from outliers import NONE, OUTLIERS, Outliers

from npu_export.encoders import find_encoder
from npu_export.encoders.dinov2 import DINOV2_SMALL_REG4
from npu_export.encoders.spec import EncoderSpec
from npu_export.encoders.vit import VIT_BASE
from npu_export.pipeline import export
from npu_runtime.artifact.schema import Precision
from npu_runtime.errors import ParityError

FAMILIES = dict(zip(MUTATIONS, tiny.FAMILIES))
CASES = [(encoder, mutation) for family, encoder in FAMILIES.items() for mutation in MUTATIONS[family]]
FULL_SIZE = [
    (e, mutation) for e, family in ((VIT_BASE, "vit"), (DINOV2_SMALL_REG4, "dinov2")) for mutation in MUTATIONS[family]
]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
WITH_TOKENS = [encoder for encoder in tiny.FAMILIES if encoder.outputs[-1].name == "tokens"]


UNSEEN = {(name, "swap_query_and_key", "1000 in 4 of all tokens") for name in (tiny.TINY.name, tiny.TINY_DINOV2.name)}
"""Beside four channels of 1000 a norm leaves the other sixty of a tiny network a thousandth, and attention is uniform
whichever way round its products are: the outputs differ by less than float32 rounds. At full size it is seen."""


def named(case: object) -> str | None:
    if isinstance(case, Outliers):
        return str(case)
    return case.name if isinstance(case, EncoderSpec) else getattr(case, "__name__", None)


def gate_with(encoder: EncoderSpec, outliers: Outliers) -> Gate:
    if outliers.few and encoder is tiny.TINY_CONVNEXT:
        pytest.skip("no tokens of which a few could be massive")
    return _gate(encoder.name, outliers)


@functools.cache
def _gate(name: str, outliers: Outliers) -> Gate:
    return gate_of(find_encoder(name), outliers)


@pytest.mark.parametrize("outliers", OUTLIERS, ids=named)
@pytest.mark.parametrize("encoder", tiny.FAMILIES, ids=named)
def test_the_right_network_passes_in_every_precision(encoder: EncoderSpec, outliers: Outliers) -> None:
    gate = gate_with(encoder, outliers)
    for precision in PRECISIONS:
        results = gate.judge(gate.outputs(precision), precision)
        assert beyond(results) == []
        assert precision == "fp32" or largest_share(results) > 0.3  # limits are near what rounding does
        assert beyond(gate.judge_unrounded(gate.unrounded(precision), precision)) == []


@pytest.mark.parametrize("outliers", OUTLIERS[1:], ids=named)
def test_outliers_are_there(outliers: Outliers) -> None:
    largest = {
        name: float(np.abs(array).max()) for name, array in gate_with(tiny.TINY_PE_LANG, outliers).reference.items()
    }
    assert all(
        0.9 * outliers.value < value < 1.2 * outliers.value for value in largest.values()
    )  # there is no last norm
    massive = np.abs(gate_with(tiny.TINY_PE_LANG, outliers).reference["tokens"]) > outliers.value / 2
    channels, tokens = massive.any(axis=(0, 1)), massive.any(axis=2)
    assert channels.sum() == outliers.channels
    assert set(tokens.sum(axis=1)) == {3 if outliers.few else tokens.shape[1]}


@pytest.mark.parametrize("outliers", OUTLIERS, ids=named)
@pytest.mark.parametrize(("encoder", "mutation"), CASES, ids=named)
def test_a_wrong_network_fails_in_every_precision(encoder: EncoderSpec, mutation: Mutation, outliers: Outliers) -> None:
    gate = gate_with(encoder, outliers)
    if (encoder.name, mutation.__name__, str(outliers)) in UNSEEN:
        changed = gate.judge(gate.outputs("fp32", mutation), "fp32")
        assert largest_share(changed) < 1  # once it is seen, it must be refused
        return
    passed = [precision for precision in PRECISIONS if not gate.refuses(mutation, precision)]
    assert passed == []


def test_rounding_hides_a_fault_that_is_found_without_it() -> None:
    gate = gate_with(tiny.TINY, NONE)
    outputs = gate.outputs("bf16", tanh_gelu)
    assert beyond(gate.judge(outputs, "bf16")) == []
    assert gate.refuses(tanh_gelu, "bf16")


@pytest.mark.parametrize("outliers", OUTLIERS, ids=named)
@pytest.mark.parametrize("encoder", WITH_TOKENS, ids=named)
def test_the_mean_of_patches_is_not_taken_for_the_cls_token(encoder: EncoderSpec, outliers: Outliers) -> None:
    gate = gate_with(encoder, outliers)
    prefix = encoder.outputs[-1].shape[1] - (encoder.image_size // encoder.stride) ** 2  # type: ignore[operator]
    for precision in PRECISIONS:
        refused = gate.refuses(lambda _: None, precision, lambda outputs: mean_of_patches(outputs, prefix))
        assert refused == (prefix > 0)  # AIMv2's embedding is that mean


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("encoder", FAMILIES.values(), ids=named)
def test_a_program_of_a_wrong_network_leaves_no_artifact(
    encoder: EncoderSpec, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real gate: the network changes after all that is known of it was measured."""
    first = next(mutations[0] for family, mutations in MUTATIONS.items() if FAMILIES[family] == encoder)

    with (
        changed_before_the_freezing(on_network(first), monkeypatch),
        pytest.raises(ParityError, match="differs from the eager reference"),
    ):
        export(encoder, weights="random:0", formats=("torchscript",), precision=precision, output=tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_a_fault_below_the_rounding_of_half_precision_leaves_no_artifact(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        changed_before_the_freezing(on_network(tanh_gelu), monkeypatch),
        pytest.raises(ParityError, match="another network than the eager one"),
    ):
        export(tiny.TINY, weights="random:0", formats=(format,), precision="fp16", output=tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", autouse=True)
def _forget_gates() -> Iterator[None]:
    yield
    _gate.cache_clear()


@pytest.mark.full
@pytest.mark.parametrize("outliers", [NONE, Outliers(100), Outliers(1000, 4, few=True)], ids=named)
@pytest.mark.parametrize("encoder", [VIT_BASE, DINOV2_SMALL_REG4], ids=named)
def test_the_right_network_passes_at_full_size(encoder: EncoderSpec, outliers: Outliers) -> None:
    gate = _gate(encoder.name, outliers)
    for precision in PRECISIONS:
        assert beyond(gate.judge(gate.outputs(precision), precision)) == [], precision


@pytest.mark.full
@pytest.mark.parametrize("outliers", [NONE, Outliers(100), Outliers(1000, 4, few=True)], ids=named)
@pytest.mark.parametrize(("encoder", "mutation"), FULL_SIZE, ids=named)
def test_a_wrong_network_fails_at_full_size(encoder: EncoderSpec, mutation: Mutation, outliers: Outliers) -> None:
    gate = _gate(encoder.name, outliers)
    assert [precision for precision in PRECISIONS if not gate.refuses(mutation, precision)] == []
