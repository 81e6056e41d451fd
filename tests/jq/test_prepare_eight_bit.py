"""Prepared weights with 8-bit activations, transformed in every way; inputs quantized once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.errors import SpecError
from jq.kernels.activations import normalised_input, plan_of, quantize_input, rms_norm, shared_plan
from jq.kernels.choice import W8A8, explain
from jq.matmul import qmatmul
from jq.methods.rtn import rtn_quantize
from jq.prepare import prepare
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.spec import FP8, w8a8
from tests.jq import cases, problems
from tests.oracles import qmatmul as oracle

BF16 = 2.5e-3
KINDS = ("int8 tensor / tensor", "int8 tensor static / channel", "fp8 token / channel", "blocks")
product = jax.jit(qmatmul)


@functools.cache
def blocks(k: int = 256, n: int = 128) -> QTensor:
    spec = w8a8(FP8, activation="group", weight="block")
    return rtn_quantize(problems.weights(k, n), spec).to_qtensor(spec)


@functools.cache
def pair(name: str, **options) -> tuple[QTensor, PreparedTensor]:
    """A weight [128, 64], or in blocks [256, 128], portable and prepared."""
    w = blocks() if name == "blocks" else cases.weight(name, 128, 64, **options)
    ready = prepare(w, "sm_90")
    assert isinstance(ready, PreparedTensor)
    return w, ready


def inputs(tokens: int = 5, k: int = 128) -> jax.Array:
    return jnp.asarray(cases.activations(tokens, k), jnp.bfloat16)


def of(w) -> jax.Array:
    return inputs(k=w.k)


def stack(*tensors):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)


@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_the_portable_weight(name):
    w, ready = pair(name)
    assert explain(w, device="sm_90").kernel == W8A8
    y = product(of(w), ready)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(product(of(w), w)))
    # A value between two codes of float8 goes one way in float32, another in float64: 2^-4 of it.
    limit = 1e-2 if w.spec.is_float else BF16
    assert problems.relative_error(y, oracle.qmatmul(np.asarray(of(w), np.float64), w)) < limit


def test_act_order():
    w, ready = pair("int8 token / channel", act_order=True)
    expected = oracle.qmatmul(np.asarray(inputs(), np.float64), w)
    assert problems.relative_error(product(inputs(), ready), expected) < BF16


def test_a_prepared_weight_holds_the_codes_and_the_scales():
    w, ready = pair("int8 tensor static / channel")
    assert ready.nbytes == 128 * 64 + 4 * 64 + 4
    assert (ready.spec, ready.shape, ready.capability) == (w.spec, (128, 64), (9, 0))
    assert float(ready.input_scale) == float(w.input_scale)
    assert prepare(w, "sm_80").capability == (8, 0)


@pytest.mark.parametrize("name", ["int8 token / channel", "blocks"])
def test_gradient_in_x(name):
    """That of the dequantized weight, straight through the rounding of x; zeros for the weight."""
    w, ready = pair(name)
    weighting = np.random.default_rng(0).standard_normal((5, w.n)).astype(np.float32)

    def loss(x, w):
        return jnp.sum(qmatmul(x, w).astype(jnp.float32) * weighting)

    x = of(w)
    gradient = jax.jit(jax.grad(loss))
    dx = gradient(x, ready)
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(dx), np.asarray(gradient(x, w)))
    rounded = oracle.round_to(oracle.weight(w), "bfloat16")
    exact = np.asarray(jnp.asarray(weighting, jnp.bfloat16), np.float64) @ rounded.T
    assert problems.relative_error(dx, exact) < BF16
    zeros = jax.grad(lambda w: loss(x, w), allow_int=True)(ready)
    assert not np.any(np.asarray(zeros.weight.scale))


@pytest.mark.parametrize("name", ["int8 token / channel", "fp8 tensor static / tensor"])
def test_vmap(name):
    """Over rows, where they are more rows; over experts, one after the other."""
    w, ready = pair(name)
    x = jnp.stack([inputs(), inputs() * 2])
    y = jax.jit(jax.vmap(qmatmul, (0, None)))(x, ready)
    halved = dataclasses.replace(w, scale=w.scale / 2)
    experts = prepare(stack(w, halved), "sm_90")
    both = jax.jit(jax.vmap(qmatmul))(x, experts)
    for i, (one, expert) in enumerate(zip(x, (w, halved), strict=True)):
        np.testing.assert_array_equal(np.asarray(y[i]), np.asarray(product(one, w)))
        np.testing.assert_array_equal(np.asarray(both[i]), np.asarray(product(one, expert)))


def test_scan_over_stacked_layers():
    w = cases.weight("int8 tensor static / channel", 64, 64)
    stacked = prepare(stack(w, dataclasses.replace(w, scale=w.scale * 2)), "sm_90")
    assert stacked.input_scale.shape == (2,)

    @jax.jit
    def run(x, stacked):
        return jax.lax.scan(lambda h, w: (qmatmul(h, w), None), x, stacked)[0]

    x = inputs(3, 64)
    by_hand = 2 * product(product(x, w), w)
    assert problems.relative_error(run(x, stacked), np.asarray(by_hand, np.float64)) < 1e-6


@pytest.mark.parametrize(("device", "rows"), [("sm_90", 3), ("sm_90", 70), ("sm_80", 3)])
def test_export_for_both_platforms_from_here(device, rows):
    """What Mosaic refuses it refuses here, without a GPU; and the program still runs here.

    For GPUs other than Hopper's, kernels are compiled beside one: exported programs have XLA's.
    """
    w, _ = pair("int8 token / channel")
    ready = prepare(w, device)
    exporter = jax.export.export(jax.jit(lambda x: qmatmul(x, ready)), platforms=["cpu", "cuda"])
    program = exporter(jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16))
    y = jax.jit(program.call)(inputs(rows))
    np.testing.assert_array_equal(np.asarray(y), np.asarray(product(inputs(rows), w)))
    text = program.mlir_module()
    assert ("mosaic" in text) == (device == "sm_90")


# Inputs quantized once


@pytest.mark.parametrize("kind", ["portable", "prepared"])
@pytest.mark.parametrize("name", ["int8 token / channel", "int8 tensor / tensor", "blocks"])
def test_an_input_can_be_quantized_once(name, kind):
    """The same numbers and gradients, whoever quantizes."""
    w = pair(name)[kind == "prepared"]
    x, gain = of(w), jnp.linspace(0.5, 2, w.k, dtype=jnp.bfloat16)
    plan = shared_plan([w, w])

    def once(x):
        quantized = normalised_input(x, gain, 1e-5, plan)
        return qmatmul(quantized, w) + qmatmul(quantized, w)

    def apart(x):
        return qmatmul(rms_norm(x, gain, 1e-5), w) + qmatmul(rms_norm(x, gain, 1e-5), w)

    for ours, theirs in ((once, apart), tuple(map(gradient_of, (once, apart)))):
        got, expected = (np.asarray(jax.jit(f)(x), np.float64) for f in (ours, theirs))
        assert problems.relative_error(got, expected) < 1e-6


def gradient_of(function):
    return jax.grad(lambda x: jnp.sum(function(x).astype(jnp.float32)))


def test_what_shares_an_input():
    plain, w = jnp.ones((128, 64)), pair("int8 token / channel")
    other, static = pair("fp8 token / channel"), pair("int8 tensor static / channel")
    ordered = pair("int8 token / channel", act_order=True)
    assert shared_plan([w[0], w[0]]) == plan_of(w[0])
    assert shared_plan([w[1], w[1]]).capability == (9, 0)
    for kernels in ([], [w[0], plain], [w[0], other[0]], [w[0], w[1]], [static[0]], [ordered[0]]):
        assert shared_plan(kernels) is None
    four = cases.weight("int4 g32", 128, 64)
    assert shared_plan([four, four]) is None


def test_activations_and_weights_have_to_agree():
    w, _ = pair("int8 token / channel")
    x = quantize_input(inputs(), plan_of(w))
    assert (x.shape, x.dtype) == ((5, 128), jnp.bfloat16)
    ordered, _ = pair("int8 token / channel", act_order=True)
    for wrong in (pair("fp8 token / channel")[0], pair("int8 token / channel")[1], ordered):
        with pytest.raises(SpecError, match="quantized for"):
            qmatmul(x, wrong)
    for wrong in (jnp.ones((128, 64)), cases.weight("int4 g32", 128, 64)):
        with pytest.raises(SpecError, match="8-bit activations"):
            qmatmul(x, wrong)
    with pytest.raises(SpecError, match=r"\(5, 128\)"):
        qmatmul(x, cases.weight("int8 token / channel", 64, 64))
