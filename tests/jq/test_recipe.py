"""Which linear is quantized how."""

import pytest

from jq.errors import SpecError
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.recipe import Rule, resolve, rounding_of, uniform
from jq.spec import w4a16, w8a8

RECIPE = (
    Rule(r"layers_0/", None, None),
    Rule(r"mlp/down_proj$", w8a8(), SmoothQuant()),
    Rule(r"layers_\d+/", w4a16(), GPTQ()),
)


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("layers_0/mlp/down_proj", None),
        ("layers_1/mlp/down_proj", RECIPE[1]),
        ("layers_10/attention/q_proj", RECIPE[2]),
        ("lm_head", None),
    ],
)
def test_the_first_match_decides(path, rule):
    assert resolve(RECIPE, path) == rule


def test_uniform_recipes_match_everything():
    (rule,) = uniform(w4a16(), RTN())
    assert resolve((rule,), "anything/at/all") == rule


def test_what_a_rule_refuses():
    with pytest.raises(SpecError, match=r"'\(' is no regular expression"):
        Rule("(", w4a16())
    with pytest.raises(SpecError, match="no method"):
        Rule("x", w4a16(), None)


@pytest.mark.parametrize(
    ("method", "rounding"),
    [
        (RTN(clip="mse"), RTN(clip="mse")),
        (GPTQ(), GPTQ()),
        (AWQ(), RTN(clip="output")),
        (AWQ(rounding=GPTQ()), GPTQ()),
        (SmoothQuant(), RTN()),
    ],
)
def test_what_rounds(method, rounding):
    assert rounding_of(method) == rounding
