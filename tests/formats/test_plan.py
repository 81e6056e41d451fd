"""What formats can express, and how refusals are said."""

import dataclasses

import pytest

from jq.errors import SpecError
from jq.formats.plan import (
    EXPORT_FORMATS,
    FormatOptions,
    PlannedLinear,
    plan_of_recipe,
    schemes_for,
)
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.recipe import Rule
from jq.spec import FP8, ActivationSpec, QuantSpec, w8a8

W4 = QuantSpec("int4", 32, False)
SYM = QuantSpec("int4", 32, True)
COLUMN = QuantSpec("int8", -1, True)
BLOCK = QuantSpec(FP8, 32, True, "block", "float32", ActivationSpec(FP8, "group"))


def linear(spec, k=64, n=64, ordered=False):
    return PlannedLinear(spec, k, n, ordered)


def plan(*linears):
    return {f"layers_{i}/mlp/up_proj/kernel": one for i, one in enumerate(linears)}


@pytest.mark.parametrize(
    ("method", "ordered"),
    [
        (RTN(), False),
        (GPTQ(), False),
        (GPTQ(desc_act=True), True),
        (GPTQ(desc_act=True, static_groups=True), False),
        (GPTQ(act_group_aware=True), False),
        (AWQ(rounding=GPTQ(desc_act=True)), True),
    ],
)
def test_a_recipe_says_which_linears_will_have_an_order(method, ordered):
    recipe = (Rule("o_proj", None, None), Rule(".*", W4, method))
    found = plan_of_recipe(recipe, {"layers_0/mlp/up_proj": (64, 96), "layers_0/o_proj": (64, 64)})
    assert found == {"layers_0/mlp/up_proj/kernel": PlannedLinear(W4, 64, 96, ordered)}


@pytest.mark.parametrize(
    ("target", "one", "reason"),
    [
        ("gptq", linear(w8a8()), "GPTQ files cannot say that activations are quantized"),
        ("gptq", linear(w8a8(FP8)), "float8_e4m3fn"),
        ("gptq", linear(QuantSpec("int5", 32)), "int5"),
        ("gptq", linear(QuantSpec("int8", -1, True, "tensor")), "per tensor"),
        ("gptq", linear(QuantSpec("int3", 16), k=48), "packs 32 inputs in words"),
        ("gptq", linear(W4, n=36), "packs 8 outputs in words, but there are 36"),
        ("awq", linear(COLUMN), "int4 weights, not int8"),
        ("awq", linear(W4, ordered=True), "no act order"),
        ("awq", linear(W4, n=36), "eight outputs in a word, but there are 36"),
        ("compressed-tensors", linear(W4, ordered=True), "no act order across groups"),
        ("compressed-tensors", linear(BLOCK, ordered=True), "no act order"),
        ("compressed-tensors", linear(QuantSpec("int8", -1, True, "tensor")), "per tensor"),
    ],
)
def test_what_a_format_has_no_words_for_is_refused(target, one, reason):
    with pytest.raises(SpecError, match=reason) as caught:
        schemes_for(plan(one), target)
    assert "layers_0/mlp/up_proj/kernel" in str(caught.value)
    assert str(caught.value).startswith(f"{target} cannot express this model: ")


def test_all_refused_linears_are_named_once_with_each_reason():
    refused = plan(linear(W4), linear(COLUMN), linear(COLUMN, n=96), linear(W4, ordered=True))
    with pytest.raises(SpecError) as caught:
        schemes_for(refused, "awq")
    text = str(caught.value)
    assert "layers_0/" not in text
    assert text.count("not int8") == text.count("no act order") == 1
    assert text.index("layers_1/") < text.index("layers_2/") < text.index("not int8")
    assert text.index("not int8") < text.index("layers_3/") < text.index("no act order")


@pytest.mark.parametrize("target", EXPORT_FORMATS)
def test_nothing_to_write_is_refused(target):
    with pytest.raises(SpecError, match="nothing is quantized"):
        schemes_for({}, target)


def test_awq_has_one_group_size():
    other = dataclasses.replace(W4, group_size=64)
    with pytest.raises(SpecError, match=r"one group size.* 32 \(layers_0/.* 64 \(layers_1/"):
        schemes_for(plan(linear(W4), linear(other)), "awq")
    assert schemes_for(plan(linear(W4), linear(SYM)), "awq")


@pytest.mark.parametrize(
    ("specs", "asked", "version"),
    [
        ((SYM, COLUMN), None, "gptq"),
        ((SYM, W4), None, "gptq_v2"),
        ((SYM, W4), "gptq", "gptq"),
        ((SYM,), "gptq_v2", "gptq_v2"),
    ],
)
def test_the_version_of_gptq_files(specs, asked, version):
    found = schemes_for(plan(*map(linear, specs)), "gptq", FormatOptions(asked))
    assert {scheme.checkpoint_format for scheme in found.values()} == {version}


def test_an_order_is_only_kept_where_groups_need_it():
    column = linear(COLUMN, ordered=True)
    assert not column.needs_order
    assert linear(W4, ordered=True).needs_order
    for target in ("gptq", "compressed-tensors"):
        (scheme,) = schemes_for(plan(column), target).values()
        assert not getattr(scheme, "desc_act", False)
        assert not getattr(scheme, "act_order", False)
    old = FormatOptions(legacy_act_order=True)
    (scheme,) = schemes_for(plan(linear(W4, ordered=True)), "compressed-tensors", old).values()
    assert scheme.act_order
