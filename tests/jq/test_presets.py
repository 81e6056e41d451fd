"""Presets: every one is a spec and a method that go together."""

import pytest

from jq.errors import SpecError
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.presets import ACTIVATIONS, DEFAULT, PRESETS, default_recipe, preset
from jq.recipe import resolve
from jq.spec import FP8, ActivationSpec, QuantSpec, w4a16, w8a8


@pytest.mark.parametrize(
    ("name", "spec", "method"),
    [
        ("gptq", w4a16(128, symmetric=False), GPTQ(act_group_aware=True, clip="mse")),
        ("gptq-act-order", w4a16(128, symmetric=False), GPTQ(desc_act=True, clip="mse")),
        ("awq", w4a16(128, symmetric=False), AWQ()),
        ("rtn", w4a16(128, symmetric=False), RTN()),
        ("smoothquant", w8a8(), SmoothQuant(alpha="auto")),
        ("smoothquant-fp8", w8a8(FP8), SmoothQuant(alpha="auto", smooth="all")),
        ("int8", w8a8(), RTN()),
        ("fp8", w8a8(FP8), RTN()),
    ],
)
def test_what_the_names_mean(name, spec, method):
    assert preset(name) == (spec, method)


def test_all_names_are_tested_above():
    assert len(PRESETS) == 8
    assert all(entry.summary for entry in PRESETS.values())


def test_the_default_recipe_is_the_default_preset():
    rule = resolve(default_recipe(bits=3, group_size=64, symmetric=False), "layers_0/mlp/up_proj")
    assert rule is not None
    assert (rule.spec, rule.method) == (QuantSpec("int3", 64, False), preset(DEFAULT)[1])
    assert resolve(default_recipe(), "anything") is not None


@pytest.mark.parametrize(
    ("activation", "spec"),
    [
        ("int8-token", w8a8()),
        ("int8-tensor", w8a8(activation="tensor")),
        ("int8-static", w8a8(activation="tensor", static=True)),
        ("fp8-token", w8a8(FP8)),
        ("fp8-tensor", w8a8(FP8, activation="tensor")),
        ("fp8-static", w8a8(FP8, activation="tensor", static=True)),
        ("fp8-block", w8a8(FP8, activation="group", weight="block")),
    ],
)
def test_weights_follow_the_activations(activation, spec):
    assert preset("gptq", activation=activation)[0] == spec


def test_every_activation_is_tested_above():
    assert set(ACTIVATIONS) == {"none"} | {
        *("int8-token", "int8-tensor", "int8-static"),
        *("fp8-token", "fp8-tensor", "fp8-static", "fp8-block"),
    }


def test_weights_alone_can_be_8_bits():
    assert preset("int8", activation="none")[0] == QuantSpec("int8", -1)
    assert preset("fp8", activation="none")[0] == QuantSpec(FP8, -1)
    assert preset("rtn", bits=8, group_size=32)[0] == QuantSpec("int8", 32, False)
    assert preset("fp8", activation="fp8-block", group_size=64)[0].group_size == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gtpq"}, "method 'gtpq' is unknown; known: gptq, "),
        ({"activation": "int8"}, "activation 'int8' is unknown; known: none, "),
        ({"bits": 9}, r"bits 9 is not in 2\.\.8"),
        ({"activation": "fp8-token", "bits": 4}, "bits 4 with activation fp8-token"),
        ({"name": "fp8", "activation": "none", "bits": 4}, "bits 4 with method fp8"),
        ({"name": "int8", "activation": "fp8-token"}, "'int8' has int weights"),
        ({"name": "smoothquant-fp8", "activation": "int8-token"}, "has fp8 weights"),
        ({"activation": "int8-token", "group_size": 64}, "one weight scale per output"),
        ({"activation": "int8-token", "symmetric": False}, "need symmetric weights"),
    ],
)
def test_combinations_without_a_meaning(arguments, message):
    with pytest.raises(SpecError, match=message):
        preset(**arguments)


def test_static_activations_are_static():
    act = preset("smoothquant", activation="int8-static")[0].activation
    assert act == ActivationSpec("int8", "tensor", True)
