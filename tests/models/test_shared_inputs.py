"""Inputs that several linears read in 8 bits are quantized once, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import tree
from jq.methods.rtn import rtn_quantize
from jq.models.decoder import Block
from jq.models.layers import RMSNorm
from jq.spec import FP8, w8a8
from tests.jq import jaxprs
from tests.models.running import TOKENS


def quantized(params, spec, only=""):
    """Every linear of the blocks whose path holds `only`, rounded to nearest."""
    quantize = jax.jit(lambda w: rtn_quantize(w, spec).to_qtensor(spec))
    for path, leaf in list(tree.leaves(params)):
        if path.startswith("layers_") and path.endswith("/kernel") and only in path:
            params = tree.replace(params, path, quantize(jnp.asarray(leaf, jnp.float32)))
    return params


def apart(monkeypatch):
    """Every linear quantizes its own input."""
    stage = Block.stage

    def separate(self, index, x, carry, places, *, once=False):
        return stage(self, index, x, carry, places)

    monkeypatch.setattr(Block, "stage", separate)


def roundings(model, params) -> int:
    """Per layer: how often activations are rounded to integers."""
    program = jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS))(params)
    rounds = sum(e.primitive.name == "round" for e in jaxprs.equations(program))
    return rounds // len(model.block_names)


def test_an_input_is_rounded_once(load, monkeypatch):
    model, params, _, _ = load("llama-bias-gelu")
    params = quantized(params, w8a8())
    assert roundings(model, params) == 4  # of q, k, v; o; gate, up; down
    apart(monkeypatch)
    assert roundings(model, params) == 7


@pytest.mark.parametrize("spec", [w8a8(), w8a8(FP8, activation="tensor")], ids=["int8", "fp8"])
def test_the_numbers_do_not_change(load, monkeypatch, spec):
    model, params, _, _ = load("llama-bias-gelu")
    params = quantized(params, spec)

    def logits():
        return np.asarray(jax.jit(lambda p: model.apply({"params": p}, TOKENS))(params))

    once = logits()
    apart(monkeypatch)
    np.testing.assert_array_equal(once, logits())


def test_inputs_of_different_kinds_are_not_shared(load):
    model, params, _, _ = load("llama-bias-gelu")
    some = quantized(params, w8a8(), "q_proj")
    assert roundings(model, some) == 1


def test_a_norm_alone_gives_plain_activations():
    norm = RMSNorm(1e-5)
    x = jnp.ones((2, 3, 8), jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    assert norm.apply(variables, x).dtype == jnp.bfloat16
