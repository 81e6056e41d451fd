"""Every code of a quantized model against the whole procedure in float64."""

import functools

import numpy as np
import pytest

from jq import tree
from jq.calib.driver import quantize_model
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN, rtn_quantize
from jq.methods.smoothquant import SmoothQuant
from jq.recipe import Rule, uniform
from jq.spec import QuantSpec, w8a8
from tests.calib import decoders, following

pytestmark = pytest.mark.usefixtures("fast_compiles")

INT4 = QuantSpec("int4", 16, symmetric=False, scale_dtype="float32")
INT3 = QuantSpec("int3", 16, symmetric=False, scale_dtype="float32")
STATIC = w8a8(activation="tensor", static=True)


@functools.cache
def quantized(recipe, name="llama3", seed=7):
    model, params, _, _ = decoders.make(name)
    return quantize_model(model, params, recipe, decoders.tokens(seed=seed))


def verdict(recipe, name="llama3", seed=7):
    _, _, raw, weights = decoders.make(name)
    params, reports = quantized(recipe, name, seed)
    samples = list(decoders.tokens(seed=seed))
    return following.follow(raw, weights, params, reports, recipe, samples)


GPTQS = {
    "plain": GPTQ(),
    "desc_act": GPTQ(desc_act=True),
    "static": GPTQ(desc_act=True, static_groups=True, clip="mse"),
    "gar": GPTQ(act_group_aware=True),
    "parallel": GPTQ(true_sequential=False, clip="output"),
}


@pytest.mark.parametrize(
    "how", ["plain", *[pytest.param(how, marks=pytest.mark.slow) for how in list(GPTQS)[1:]]]
)
def test_gptq(how):
    assert verdict(uniform(INT4, GPTQS[how])).differing == 0


def test_gptq_is_not_rtn():
    """Codes of a run whose statistics do not arrive would be those of rounding to nearest."""
    _, params, _, _ = decoders.make()
    learned = decoders.qtensors(quantized(uniform(INT4, GPTQ()))[0])
    for path, tensor in learned.items():
        plain = rtn_quantize(tree.get(params, f"{path}/kernel"), INT4)
        differing = np.mean(np.asarray(plain.codes) != np.asarray(tensor.unsigned_codes()))
        assert differing > 0.1, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3-layers", "mistral-window"])
def test_gptq_of_other_families(name):
    assert verdict(uniform(INT4, GPTQ()), name).differing == 0


def test_awq():
    found = verdict(
        uniform(INT3, AWQ(n_grid=5, duo_scaling=True, search_tokens=2 * decoders.LENGTH))
    )
    assert found.differing == 0
    assert len(set(found.choices.values())) > 1


@pytest.mark.slow
def test_awq_on_its_full_grid():
    assert verdict(uniform(INT3, AWQ())).differing == 0


@pytest.mark.slow
@pytest.mark.parametrize("rounding", [GPTQ(desc_act=True), GPTQ(true_sequential=False)])
def test_awq_with_a_fixed_exponent_and_gptq(rounding):
    method = AWQ(search_scale=False, duo_scaling=True, rounding=rounding)
    assert verdict(uniform(INT4, method)).differing == 0


# Tokens of a seed with which no activation comes near a rounding boundary: on the other side of one
# it would change everything behind it.
SMOOTH = {
    "O1": (w8a8(), SmoothQuant(0.5), 11),
    "O2": (w8a8(activation="tensor", weight="tensor"), SmoothQuant(0.8), 14),
    "O3": (STATIC, SmoothQuant(0.6, smooth="all"), 9),
}


@pytest.mark.parametrize(
    "level", ["O3", *[pytest.param(level, marks=pytest.mark.slow) for level in ("O1", "O2")]]
)
def test_smoothquant(level):
    spec, method, seed = SMOOTH[level]
    found = verdict(uniform(spec, method), seed=seed)
    assert found.activation_margin > 3e-5
    # Scales in float32 put the lowest weight of each output on a boundary; no other code differs.
    assert found.differing < 0.01 * found.codes


MIXED = (
    Rule("layers_1/attention/k_proj", None),
    Rule("attention/[qk]_proj", QuantSpec("int3", 16, scale_dtype="float16"), GPTQ()),
    Rule("o_proj", QuantSpec("int8", -1, False), RTN("mse")),
    Rule("up_proj", None, None),
    Rule("layers_0/mlp/down_proj", QuantSpec("int2", 8, False), GPTQ(desc_act=True)),
    Rule("_proj", QuantSpec("int4", 16), RTN()),
)


@pytest.mark.slow
def test_mixed_recipe():
    assert verdict(MIXED).differing == 0
    found = decoders.qtensors(quantized(MIXED)[0])
    assert len(found) == 14 - 3
    assert found["layers_0/mlp/down_proj"].spec.bits == 2
    assert found["layers_1/mlp/down_proj"].spec.bits == 4


DUO = AWQ(n_grid=5, duo_scaling=True)
MIXED_AWQ = (
    Rule("v_proj|gate_proj", None),
    Rule("layers_0/mlp/down_proj", None),
    Rule(
        "k_proj",
        QuantSpec("int8", -1, False, scale_dtype="float32"),
        AWQ(n_grid=5, duo_scaling=True),
    ),
    Rule(".*", INT3, DUO),
)


@pytest.mark.slow
def test_mixed_recipe_with_scales():
    assert verdict(MIXED_AWQ).differing == 0
