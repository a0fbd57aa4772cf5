from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_export.key_folding import fold_keys


def test_keys_with_equal_details_fold_over_one_integer() -> None:
    details = {f"blocks.{i}.norm1.weight": "[64]" for i in (0, 1, 2, 5)}
    details |= {"blocks.3.norm1.weight": "[32]", "norm.weight": "[64]", "blocks.7.fc1.bias": "[4]"}
    assert fold_keys(details) == [
        "blocks.{0-2,5}.norm1.weight [64] (4)",
        "blocks.3.norm1.weight [32]",
        "norm.weight [64]",
        "blocks.7.fc1.bias [4]",
    ]


def test_the_order_of_keys_does_not_change_a_fold() -> None:
    assert fold_keys({f"blocks.{i}.weight": "[1]" for i in (10, 2, 0, 1, 9)}) == ["blocks.{0-2,9-10}.weight [1] (5)"]


def test_numbers_behind_slashes_and_underscores_fold_as_flax_writes_them() -> None:
    details = {f"Transformer/encoderblock_{i}/LayerNorm_0/bias": "[64]" for i in (0, 1, 3)}
    assert fold_keys(details) == ["Transformer/encoderblock_{0-1,3}/LayerNorm_0/bias [64] (3)"]


def test_only_the_first_number_of_a_key_folds() -> None:
    details = {f"stages.{i}.blocks.{j}.gamma": "[8]" for i in (0, 1) for j in (0, 1)}
    assert fold_keys(details) == ["stages.{0-1}.blocks.0.gamma [8] (2)", "stages.{0-1}.blocks.1.gamma [8] (2)"]


def test_a_number_inside_a_word_does_not_fold() -> None:
    assert fold_keys({"fc1.weight": "[1]", "fc2.weight": "[1]"}) == ["fc1.weight [1]", "fc2.weight [1]"]


@pytest.mark.parametrize("key", ["{", "}", "{}", "{0}.weight", "layer.{i}.weight", "a.01.b", "a.²", "0", "{}.3.{}", ""])
def test_a_key_of_any_spelling_is_shown_as_it_is(key: str) -> None:
    assert fold_keys({key: "[1]"}) == [f"{key} [1]"]


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_folding_takes_any_keys(details: dict[str, str]) -> None:
    lines = fold_keys(details)
    assert len(lines) <= len(details)
    assert bool(lines) == bool(details)


def test_a_key_that_ends_where_another_has_its_number_is_shown_too() -> None:
    assert fold_keys({"blocks.0": "[1]", "blocks.": "[1]"}) == ["blocks.0 [1]", "blocks. [1]"]
