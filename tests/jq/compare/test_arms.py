"""Arms by name, and which pairs of them are unfair."""

import dataclasses

import pytest

from jq.compare.arms import ARMS, DEFAULT_ARMS, ORIGINAL, Arm, Numbers, find_arms, unfair_pairs
from jq.errors import SpecError
from jq.methods.rtn import RTN
from jq.spec import w4a16

NUMBERS = Numbers(bits=3, group_size=64, symmetric=True, skip=("layers_0/",))


def by_name(names=tuple(ARMS), numbers=NUMBERS):
    return {arm.name: arm for arm in find_arms(names, numbers)}


def test_weight_only_arms_share_one_format():
    arms = by_name()
    for name, arm in arms.items():
        if arm.family in ("RTN", "AWQ", "GPTQ"):
            assert arm.spec is not None
            form = (arm.spec.dtype, arm.spec.group_size, arm.spec.symmetric)
            assert form == ("int3", 64, True), name
        elif name != ORIGINAL:
            assert arm.spec is not None
            assert arm.spec.bits == 8
            assert arm.spec.activation is not None, name


def test_gptq_arms_differ_in_their_order_only():
    arms = by_name()
    orders = {"desc_act": False, "act_group_aware": False, "static_groups": False}
    plain = arms["gptq-no-act"].method
    for name in ("gptq", "gptq-act-order", "gptq-static"):
        method = arms[name].method
        assert method != plain
        assert dataclasses.replace(method, **orders) == plain, name


def test_skipped_linears_come_first_in_every_recipe():
    for name, arm in by_name().items():
        if name == ORIGINAL:
            assert arm.recipe == ()
            continue
        skipped, rest = arm.recipe
        assert (skipped.pattern, skipped.spec) == ("layers_0/", None)
        assert rest.spec == arm.spec


def test_the_original_comes_first_and_no_arm_twice():
    assert [a.name for a in find_arms(["awq", "original", "awq", "rtn"], NUMBERS)] == [
        "original", "awq", "rtn",
    ]  # fmt: skip
    assert set(DEFAULT_ARMS) <= set(ARMS)


def test_unknown_names_are_listed():
    with pytest.raises(SpecError, match=r"'gptk' is unknown here; known: rtn, .*gptq"):
        find_arms(["gptk"], NUMBERS)
    with pytest.raises(SpecError, match="nothing to compare"):
        find_arms(["original"], NUMBERS)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "."])
def test_names_are_fit_for_files(name):
    with pytest.raises(SpecError, match="letters, digits and hyphens"):
        Arm(name, "", w4a16(), RTN())


def test_a_method_without_a_format_is_refused():
    with pytest.raises(SpecError, match="both a spec and a method"):
        Arm("half", "", None, RTN())


def test_hashes_follow_the_recipe_and_the_spec():
    arms = by_name()
    hashes = {arm.hash("x") for arm in arms.values()}
    assert len(hashes) == len(arms)
    assert by_name()["awq"].hash("x") == arms["awq"].hash("x") != arms["awq"].hash("y")
    other = by_name(numbers=dataclasses.replace(NUMBERS, bits=4))
    assert other["awq"].hash("x") != arms["awq"].hash("x")
    assert other["int8"].hash("x") == arms["int8"].hash("x")


def test_gptq_without_any_order_is_no_opponent_for_awq():
    pairs = unfair_pairs(find_arms(list(ARMS), NUMBERS))
    assert {(a, b) for a, b, _ in pairs} == {("gptq-no-act", "awq"), ("gptq-no-act", "awq-gptq")}
    assert all("without act order" in why for *_, why in pairs)
    assert unfair_pairs(find_arms(["gptq", "gptq-act-order", "awq", "rtn"], NUMBERS)) == []
