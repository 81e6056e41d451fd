"""Recipes against the shapes of a model, before anything runs."""

import pytest

from jq.errors import SpecError
from jq.methods.gptq import GPTQ
from jq.preflight import check_group_sizes, check_recipe
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec, w4a16, w8a8

LINEARS = {
    f"layers_{i}/{name}": shape
    for i in range(12)
    for name, shape in {"attention/q_proj": (96, 96), "mlp/down_proj": (160, 96)}.items()
}
OTHERS = ("embed/embedding", "lm_head/kernel")


def refusal(recipe, linears=LINEARS):
    with pytest.raises(SpecError) as caught:
        check_recipe(recipe, linears, OTHERS)
    return str(caught.value)


@pytest.mark.parametrize("size", [16, 32, -1])
def test_sizes_that_divide_pass(size):
    check_recipe(uniform(w4a16(size), GPTQ()), LINEARS, OTHERS)


def test_all_tensors_and_the_sizes_that_serve_all_are_listed():
    assert refusal(uniform(w4a16(64), GPTQ())) == (
        "group_size 64 does not divide the inputs of layers_0..11/attention/q_proj (96), "
        "layers_0..11/mlp/down_proj (160); valid for all of the linears: 16, 32, -1 (per channel)"
    )


def test_only_wrong_tensors_are_listed():
    text = refusal(uniform(w4a16(80), GPTQ()))
    assert "layers_0..11/attention/q_proj (96); valid" in text
    assert "down_proj" not in text


def test_layers_that_differ_are_told_apart():
    odd = LINEARS | {"layers_4/mlp/down_proj": (24, 96), "head": (30, 5)}
    text = refusal(uniform(w4a16(32), GPTQ()), odd)
    assert "of layers_4/mlp/down_proj (24), head (30); valid for all" in text
    gaps = {f"layers_{i}/o": (24, 8) for i in (0, 1, 3)}
    assert "layers_0..1/o (24), layers_3/o (24)" in refusal(uniform(w4a16(16), GPTQ()), gaps)


def test_every_group_size_of_a_recipe_is_reported():
    recipe = (Rule("q_proj", w4a16(64)), Rule("layers_0/mlp", w4a16(128)), Rule("", w4a16(32)))
    first, second = refusal(recipe).split("(per channel); ")
    assert first.startswith("group_size 64 does not divide the inputs of layers_0..11/attention")
    assert second.startswith("group_size 128 does not divide the inputs of layers_0/mlp/down_proj")


def test_blocks_divide_outputs_too():
    blocks = w8a8("float8_e4m3fn", activation="group", weight="block")
    text = refusal(uniform(blocks, GPTQ()), {"layers_0/a": (128, 96), "layers_0/b": (128, 128)})
    assert "the inputs and outputs of layers_0/a (128, 96); valid for all of the linears: 16, 32"\
        in text  # fmt: skip
    assert "per channel" not in text


def test_full_precision_needs_no_size():
    check_recipe((Rule("q_proj", None, None), Rule("", w4a16(80))), LINEARS)
    check_group_sizes((Rule("q_proj", QuantSpec("int4", 96)),), LINEARS)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ((), "quantizes nothing"),
        ((Rule("", None, None),), "quantizes nothing"),
        ((Rule("", None, None), Rule("", w4a16(32))), "quantizes nothing"),
        ((Rule("lm_head", w4a16(32)),), "rule 'lm_head' decides about nothing"),
        ((Rule("k_proj", None, None), Rule("", w4a16(32))), "rule 'k_proj' decides about nothing"),
        ((Rule("", w4a16(32)), Rule("q_proj", w4a16(16))), "rule 'q_proj' decides about nothing"),
    ],
)
def test_rules_that_decide_nothing(recipe, message):
    assert message in refusal(recipe)


def test_what_stays_anyway_may_be_named():
    check_recipe((Rule("lm_head", None, None), Rule("", w4a16(32))), LINEARS, OTHERS)
