from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_export.keymap import (
    Drop,
    KeymapPlan,
    Move,
    Rule,
    Shapes,
    concatenate,
    invert,
    match_template,
    plan_keymap,
    read_mapped,
    rename,
    source_shapes,
)
from npu_export.operations import FoldPosition, RequireZeros, Reshape, Transpose, Zeros

LAYERS = 3
RULES: tuple[Rule | Drop, ...] = (
    rename("stem.weight", "embed.weight"),
    rename("layer.{i}.norm.weight", "blocks.{i}.norm.weight"),
    concatenate([f"layer.{{i}}.{part}.weight" for part in "qkv"], "blocks.{i}.qkv.weight"),
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


def by_targets(plan: KeymapPlan) -> dict[tuple[str, ...], Move]:
    return {move.targets: move for move in plan.moves}


@pytest.mark.parametrize("key", ["blocks.0.weight", "blocks.7.weight", "blocks.10.weight", "blocks.123.weight"])
def test_i_stands_for_one_integer(key: str) -> None:
    plan = plan_keymap([rename("blocks.{i}.weight", "out.{i}")], {key: (1,)}, {f"out.{key.split('.')[1]}": (1,)})
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
    assert not match_template("blocks.{i}.weight", key)


def test_two_integers_of_a_template_keep_their_places() -> None:
    rule = rename("stages.{i}.blocks.{j}.gamma", "b{j}.s{i}")
    plan = plan_keymap([rule], {"stages.1.blocks.2.gamma": (1,)}, {"b2.s1": (1,)})
    assert plan.complete
    assert not plan_keymap([rule], {"stages.2.blocks.1.gamma": (1,)}, {"b2.s1": (1,)}).complete


@given(st.permutations(RULES), st.permutations(list(SOURCE.items())), st.permutations(list(TARGET.items())))
def test_no_order_matters(
    rules: list[Rule | Drop], source: list[tuple[str, tuple[int, ...]]], target: list[tuple[str, tuple[int, ...]]]
) -> None:
    plan = plan_keymap(rules, dict(source), dict(target))
    expected = plan_keymap(RULES, SOURCE, TARGET)
    assert plan.complete
    assert by_targets(plan) == by_targets(expected)
    assert plan.dropped == expected.dropped == {"head.weight": "the encoder ends before it"}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "second", [rename("layer.0.a", "other"), Drop("layer.0.a", "unused"), concatenate(["layer.0.a", "b"], "c")]
)
def test_two_rules_for_one_key_are_an_error(second: Rule | Drop, order: int) -> None:
    rules = [rename("layer.{i}.a", "out.{i}"), second]
    with pytest.raises(ValueError, match=r"two rules name the key layer\.0\.a"):
        plan_keymap(rules[::order], {"layer.0.a": (1,)}, {})


@pytest.mark.parametrize("order", [1, -1])
def test_two_keys_for_one_target_are_an_error(order: int) -> None:
    rules = [rename("a.{i}", "out.{i}"), rename("b", "out.0")]
    with pytest.raises(ValueError, match=r"two rules fill the target out\.0"):
        plan_keymap(rules[::order], {"a.0": (1,)}, {"out.0": (1,)})


def test_two_rules_whose_keys_and_targets_are_apart_are_no_error() -> None:
    rules = [rename("a.{i}", "out.{i}"), rename("b", "out.x")]
    assert plan_keymap(rules, {"a.0": (1,), "b": (2,)}, {"out.0": (1,), "out.x": (2,)}).complete


def test_a_rule_that_fills_half_of_its_targets_is_an_error() -> None:
    rule = Rule(("cls", "pos"), ("cls_token", "pos_embed"), FoldPosition())
    with pytest.raises(ValueError, match="targets that the network lacks: pos_embed"):
        plan_keymap([rule], {"cls": (1, 1, 4), "pos": (1, 5, 4)}, {"cls_token": (1, 1, 4)})


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
    assert plan.unexpected == {}


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
    ((target,),) = (move.targets for move in plan_keymap(RULES, SOURCE, TARGET).moves if key in move.sources)
    assert plan.complete == (shape == SOURCE[key])
    assert {mismatch.target for mismatch in plan.mismatched} == (set() if plan.complete else {target})
    assert plan.missing == plan.unexpected == {}
    assert key in plan.sources()


def test_every_source_is_used_once_or_dropped() -> None:
    plan = plan_keymap(RULES, SOURCE, TARGET)
    assert sorted([*plan.sources(), *plan.dropped]) == sorted(SOURCE)
    assert sorted(name for move in plan.moves for name in move.targets) == sorted(TARGET)


def test_only_what_is_no_plain_copy_is_transformed() -> None:
    transformed = plan_keymap(RULES, SOURCE, TARGET).transformed()
    assert transformed == {f"blocks.{i}.qkv.weight": "concatenate 3" for i in range(LAYERS)}


def test_a_concatenation_keeps_the_order_of_its_rule_whatever_the_order_of_keys() -> None:
    values = {"q": torch.full((2, 2), 1.0), "k": torch.full((2, 2), 2.0), "v": torch.full((2, 2), 3.0)}
    rule = concatenate(["q", "k", "v"], "qkv")
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
    assert sorted(read) == sorted(key for key in SOURCE if key != "head.weight")


def test_source_shapes_is_the_inverse_of_the_plan() -> None:
    sources = source_shapes(RULES, TARGET)
    assert sources == {key: shape for key, shape in SOURCE.items() if key != "head.weight"}
    assert plan_keymap(RULES, sources, TARGET).complete


INVERTIBLE = (*RULES, Rule(("kernel",), ("fc.weight",), Transpose((1, 0))), Rule((), ("fc.bias",), Zeros((5,))))


def test_inverted_rules_lead_back_to_the_same_tensors_and_leave_dropped_keys_out() -> None:
    target = {**TARGET, "fc.weight": (5, 2), "fc.bias": (5,)}
    source = source_shapes(INVERTIBLE, target)
    state = {key: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for key, shape in source.items()}
    there = dict(read_mapped(plan_keymap(INVERTIBLE, source, target), state.__getitem__))
    assert {name: tuple(tensor.shape) for name, tensor in there.items()} == target
    back = dict(read_mapped(plan_keymap(invert(INVERTIBLE), target, source), there.__getitem__))
    assert back.keys() == state.keys() == source.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_rules_that_lose_information_have_no_inverse() -> None:
    rules = [*RULES, Rule(("a", "b"), ("c", "d"), FoldPosition())]
    with pytest.raises(ValueError, match=r"c, d: fold pos_embed\[:,0\] into cls_token loses information"):
        invert(rules)
    assert len(invert(rules[:-1])) == 3


CHECK = (rename("a", "b"), Rule(("bias",), (), RequireZeros((5,))))


def test_a_rule_that_fills_nothing_checks_its_key_when_it_is_read() -> None:
    plan = plan_keymap(CHECK, {"a": (1,), "bias": (5,)}, {"b": (1,)})
    assert plan.complete
    state = {"a": torch.ones(1), "bias": torch.zeros(5)}
    assert dict(read_mapped(plan, state.__getitem__)) == {"b": state["a"]}
    state["bias"][3] = 1e-30
    with pytest.raises(ValueError, match="must be zero"):
        dict(read_mapped(plan, state.__getitem__))


def test_a_rule_that_fills_nothing_needs_its_key_in_its_shape() -> None:
    assert plan_keymap(CHECK, {"a": (1,)}, {"b": (1,)}).missing == {"bias": (5,)}
    plan = plan_keymap(CHECK, {"a": (1,), "bias": (6,)}, {"b": (1,)})
    assert list(plan.faults()) == ["mismatched  bias expected [5], got [6]"]


def test_a_key_that_only_a_reshape_would_fit_is_mismatched() -> None:
    rule = Rule(("pos",), ("pos_embed",), Reshape((-1, 4), (1, -1, 4)))
    assert plan_keymap([rule], {"pos": (9, 4)}, {"pos_embed": (1, 9, 4)}).complete
    for shape in ((9, 5), (8, 4), (1, 9, 4), (36,)):
        plan = plan_keymap([rule], {"pos": shape}, {"pos_embed": (1, 9, 4)})
        assert [(m.target, m.got) for m in plan.mismatched] == [("pos_embed", (shape,))]
