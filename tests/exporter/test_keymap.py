from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_export.encoders.vit import VIT_BASE
from npu_export.keymap import (
    Concatenate,
    Drop,
    KeymapPlan,
    Rename,
    Rule,
    Shapes,
    fold_keys,
    plan_keymap,
    read_mapped,
    source_shapes,
)
from npu_export.network import network_shapes

VIT_HF = Path(__file__).parents[1] / "data" / "layouts" / "vit.hf.tsv"

LAYERS = 3
RULES: tuple[Rule, ...] = (
    Rename("stem.weight", "embed.weight"),
    Rename("layer.{i}.norm.weight", "blocks.{i}.norm.weight"),
    Concatenate(tuple(f"layer.{{i}}.{part}.weight" for part in "qkv"), "blocks.{i}.qkv.weight"),
    Drop("head.weight", "the encoder ends before it"),
)
SOURCE: Shapes = {
    "stem.weight": (4, 3),
    **{f"layer.{i}.norm.weight": (4,) for i in range(LAYERS)},
    **{f"layer.{i}.{part}.weight": (4, 4) for i in range(LAYERS) for part in "qkv"},
    "head.weight": (10, 4),
}
TARGET: Shapes = {
    "embed.weight": (4, 3),
    **{f"blocks.{i}.norm.weight": (4,) for i in range(LAYERS)},
    **{f"blocks.{i}.qkv.weight": (12, 4) for i in range(LAYERS)},
}


def read_layout(path: Path) -> Shapes:
    lines = (line.split("\t") for line in path.read_text("utf-8").splitlines())
    return {key: tuple(map(int, dims.split(","))) for key, dims in lines}


def named_in_faults(plan: KeymapPlan) -> set[str]:
    return {*plan.missing, *plan.unexpected, *(mismatch.target for mismatch in plan.mismatched)}


@pytest.mark.parametrize("key", ["blocks.0.weight", "blocks.7.weight", "blocks.10.weight", "blocks.123.weight"])
def test_i_stands_for_one_integer(key: str) -> None:
    plan = plan_keymap([Rename("blocks.{i}.weight", "out.{i}")], {key: (1,)}, {f"out.{key.split('.')[1]}": (1,)})
    assert plan.complete
    assert plan.moves[0].sources == (key,)


@pytest.mark.parametrize(
    "key",
    [
        "blocks.01.weight",
        "blocks.-1.weight",
        "blocks.+1.weight",
        "blocks..weight",
        "blocks.1x.weight",
        "blocks.1.2.weight",
        "blocks.١.weight",
        "blocks.1.weight\n",
        "blocks.1.weights",
        "xblocks.1.weight",
        "blocksx1.weight",
        "module.blocks.1.weight",
    ],
)
def test_a_template_matches_nothing_but_whole_keys(key: str) -> None:
    plan = plan_keymap([Drop("blocks.{i}.weight", "unused")], {key: (1,)}, {})
    assert plan.unexpected == {key: (1,)}
    assert plan.dropped == {}


@given(st.permutations(RULES), st.permutations(list(SOURCE.items())), st.permutations(list(TARGET.items())))
def test_no_order_matters(
    rules: list[Rule], source: list[tuple[str, tuple[int, ...]]], target: list[tuple[str, tuple[int, ...]]]
) -> None:
    plan = plan_keymap(rules, dict(source), dict(target))
    expected = plan_keymap(RULES, SOURCE, TARGET)
    assert plan.complete
    assert {move.target: move for move in plan.moves} == {move.target: move for move in expected.moves}
    assert plan.dropped == expected.dropped == {"head.weight": "the encoder ends before it"}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "second", [Rename("layer.0.a", "other"), Drop("layer.0.a", "unused"), Concatenate(("layer.0.a", "b"), "c")]
)
def test_two_rules_for_one_key_are_an_error(second: Rule, order: int) -> None:
    rules: list[Rule] = [Rename("layer.{i}.a", "out.{i}"), second]
    with pytest.raises(ValueError, match=r"two rules name the key layer\.0\.a"):
        plan_keymap(rules[::order], {"layer.0.a": (1,)}, {})


@pytest.mark.parametrize("order", [1, -1])
def test_two_keys_for_one_target_are_an_error(order: int) -> None:
    rules = [Rename("a.{i}", "out.{i}"), Rename("b", "out.0")]
    with pytest.raises(ValueError, match=r"two rules fill the target out\.0"):
        plan_keymap(rules[::order], {"a.0": (1,)}, {"out.0": (1,)})


def test_two_rules_whose_keys_and_targets_are_apart_are_no_error() -> None:
    rules = [Rename("a.{i}", "out.{i}"), Rename("b", "out.x")]
    assert plan_keymap(rules, {"a.0": (1,), "b": (2,)}, {"out.0": (1,), "out.x": (2,)}).complete


def test_every_fault_is_listed_at_once() -> None:
    source = dict(SOURCE)
    del source["stem.weight"], source["layer.1.k.weight"]
    source |= {"extra.bias": (2,), "layer.2.norm.weight": (5,), "layer.0.v.weight": (4, 3)}
    plan = plan_keymap(RULES, source, TARGET)
    assert plan.missing == {"stem.weight": (4, 3), "layer.1.k.weight": (4, 4)}
    assert plan.unexpected == {"extra.bias": (2,)}
    assert {m.target: (m.expected, m.got) for m in plan.mismatched} == {
        "blocks.2.norm.weight": ((4,), ((5,),)),
        "blocks.0.qkv.weight": ((12, 4), ((4, 4), (4, 4), (4, 3))),
    }
    assert plan.dropped == {"head.weight": "the encoder ends before it"}
    assert list(plan.faults()) == [
        "missing     stem.weight [4, 3]",
        "missing     layer.1.k.weight [4, 4]",
        "unexpected  extra.bias [2]",
        "mismatched  blocks.2.norm.weight expected [4], got [5]",
        "mismatched  blocks.0.qkv.weight expected [12, 4], got [4, 4] + [4, 4] + [4, 3]",
    ]


def test_a_target_that_no_rule_fills_is_missing() -> None:
    plan = plan_keymap(RULES, SOURCE, {**TARGET, "norm.bias": (4,)})
    assert plan.missing == {"norm.bias": (4,)}
    assert not plan.complete


def test_a_key_whose_target_the_network_lacks_is_unexpected() -> None:
    target = {name: shape for name, shape in TARGET.items() if not name.startswith("blocks.2.")}
    plan = plan_keymap(RULES, SOURCE, target)
    assert set(plan.unexpected) == {f"layer.2.{leaf}.weight" for leaf in ("norm", "q", "k", "v")}


@given(st.sampled_from([key for key in SOURCE if key != "head.weight"]))
def test_a_plan_without_any_one_key_is_incomplete_and_names_it(key: str) -> None:
    plan = plan_keymap(RULES, {k: shape for k, shape in SOURCE.items() if k != key}, TARGET)
    assert not plan.complete
    assert plan.missing == {key: SOURCE[key]}


def test_a_dropped_key_need_not_be_there() -> None:
    plan = plan_keymap(RULES, {key: shape for key, shape in SOURCE.items() if key != "head.weight"}, TARGET)
    assert plan.complete
    assert plan.dropped == {}


@given(st.text(min_size=1).filter(lambda key: key not in SOURCE), st.lists(st.integers(1, 9), max_size=4))
def test_a_plan_with_any_key_more_is_incomplete_and_names_it(key: str, shape: list[int]) -> None:
    plan = plan_keymap(RULES, {**SOURCE, key: tuple(shape)}, TARGET)
    assert not plan.complete
    assert plan.unexpected == {key: tuple(shape)}


@given(st.sampled_from([k for k in SOURCE if k != "head.weight"]), st.lists(st.integers(0, 12), max_size=3).map(tuple))
def test_a_plan_with_any_other_shape_is_incomplete_and_names_its_target(key: str, shape: tuple[int, ...]) -> None:
    plan = plan_keymap(RULES, {**SOURCE, key: shape}, TARGET)
    moves = plan_keymap(RULES, SOURCE, TARGET).moves
    (target,) = (move.target for move in moves if key in move.sources)
    assert plan.complete == (shape == SOURCE[key])
    assert named_in_faults(plan) == (set() if plan.complete else {target})


def test_every_source_is_used_once_or_dropped() -> None:
    plan = plan_keymap(RULES, SOURCE, TARGET)
    used = list(itertools.chain.from_iterable(move.sources for move in plan.moves))
    assert sorted([*used, *plan.dropped]) == sorted(SOURCE)
    assert sorted(move.target for move in plan.moves) == sorted(TARGET)


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    parts=st.integers(1, 4),
    data=st.data(),
)
def test_the_shapes_of_a_concatenation_invert(shape: tuple[int, ...], parts: int, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    rule = Concatenate(tuple(f"s{part}" for part in range(parts)), "t", dim)
    target = rule.target_shape((shape,) * parts)
    assert target == tuple(size * parts if axis == dim else size for axis, size in enumerate(shape))
    assert rule.source_shapes(target) == (shape,) * parts
    assert rule.apply([torch.zeros(shape)] * parts).shape == target


def test_unequal_parts_do_not_concatenate() -> None:
    rule = Concatenate(("a", "b"), "t")
    assert rule.target_shape([(2, 4), (2, 4)]) == (4, 4)
    assert rule.target_shape([(1, 4), (3, 4)]) is None


def test_a_part_without_the_dim_does_not_concatenate() -> None:
    assert Concatenate(("a", "b"), "t", dim=1).target_shape([(2,), (2,)]) is None


def test_a_concatenation_keeps_the_order_of_its_rule_whatever_the_order_of_keys() -> None:
    values = {"q": torch.full((2, 2), 1.0), "k": torch.full((2, 2), 2.0), "v": torch.full((2, 2), 3.0)}
    rule = Concatenate(("q", "k", "v"), "qkv")
    for keys in itertools.permutations(values):
        plan = plan_keymap([rule], dict.fromkeys(keys, (2, 2)), {"qkv": (6, 2)})
        ((name, joined),) = read_mapped(plan, values.__getitem__)
        assert name == "qkv"
        assert torch.equal(joined, torch.cat([values["q"], values["k"], values["v"]]))


def test_an_incomplete_plan_reads_nothing() -> None:
    read: list[str] = []

    def reading(key: str) -> torch.Tensor:
        read.append(key)
        return torch.zeros(SOURCE[key])

    incomplete = plan_keymap(RULES, {**SOURCE, "extra": (1,)}, TARGET)
    with pytest.raises(ValueError, match="not complete"):
        list(read_mapped(incomplete, reading))
    assert read == []
    mapped = dict(read_mapped(plan_keymap(RULES, SOURCE, TARGET), reading))
    assert {name: tuple(tensor.shape) for name, tensor in mapped.items()} == TARGET
    assert "head.weight" not in read


def test_source_shapes_is_the_inverse_of_the_plan() -> None:
    sources = source_shapes(RULES, TARGET)
    assert sources == {key: shape for key, shape in SOURCE.items() if key != "head.weight"}
    assert plan_keymap(RULES, sources, TARGET).complete


def test_keys_with_equal_details_fold_over_one_integer() -> None:
    details = {f"blocks.{i}.norm1.weight": "[64]" for i in (0, 1, 2, 5)}
    details |= {"blocks.3.norm1.weight": "[32]", "norm.weight": "[64]", "blocks.7.fc1.bias": "[4]"}
    assert fold_keys(details) == [
        "blocks.{0-2,5}.norm1.weight [64] (4)",
        "blocks.3.norm1.weight [32]",
        "norm.weight [64]",
        "blocks.7.fc1.bias [4]",
    ]


def test_a_number_inside_a_word_does_not_fold() -> None:
    assert fold_keys({"fc1.weight": "[1]", "fc2.weight": "[1]"}) == ["fc1.weight [1]", "fc2.weight [1]"]


@pytest.mark.parametrize("key", ["{", "}", "{}", "{0}.weight", "layer.{i}.weight", "a.01.b", "a.²", "0", "{}.3.{}"])
def test_a_key_of_any_spelling_is_shown_as_it_is(key: str) -> None:
    assert fold_keys({key: "[1]"}) == [f"{key} [1]"]


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_folding_takes_any_keys(details: dict[str, str]) -> None:
    lines = fold_keys(details)
    assert len(lines) <= len(details)
    assert bool(lines) == bool(details)


def test_a_key_that_ends_where_another_has_its_number_is_shown_too() -> None:
    assert fold_keys({"blocks.0": "[1]", "blocks.": "[1]"}) == ["blocks.0 [1]", "blocks. [1]"]


def test_the_hub_keys_of_vit_fill_timms_network_wholly() -> None:
    layout = VIT_BASE.layouts[0]
    source, target = read_layout(VIT_HF), network_shapes(layout)
    plan = plan_keymap(layout.rules, source, target)
    assert len(source) == 200
    assert plan.complete
    assert set(plan.dropped) == {"classifier.weight", "classifier.bias"}
    assert len(target) == 152 - 2
    assert {move.target for move in plan.moves} == set(target)
    assert sum(len(move.sources) for move in plan.moves) == 198


def test_no_hub_key_of_vit_can_be_lost() -> None:
    layout, hub = VIT_BASE.layouts[0], read_layout(VIT_HF)
    target = network_shapes(layout)
    for key in hub:
        plan = plan_keymap(layout.rules, {name: shape for name, shape in hub.items() if name != key}, target)
        assert list(plan.missing) == ([] if key.startswith("classifier.") else [key])


def test_the_seeded_sources_of_vit_are_its_hub_keys_without_the_classifier() -> None:
    layout = VIT_BASE.layouts[0]
    expected = {key: s for key, s in read_layout(VIT_HF).items() if not key.startswith("classifier.")}
    assert source_shapes(layout.rules, network_shapes(layout)) == expected
