"""`qmatmul`: what it computes with, its gradient, and what it refuses.

The numbers of every kind of weight are in tests/pallas_kernels, where all kernels share one test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.errors import SpecError
from jq.matmul import qmatmul
from jq.spec import FP8
from tests.jq import cases, jaxprs, problems
from tests.oracles import qmatmul as oracle


@pytest.mark.parametrize("name", cases.EIGHT_BIT)
def test_eight_bit_products_are_eight_bit(name):
    """No hidden product in floats: both operands of the only dot are int8, or float8."""
    w = cases.weight(name)
    dtype = "int8" if w.spec.activation.dtype == "int8" else FP8
    for x in (cases.activations(), cases.activations().astype(jnp.bfloat16)):
        assert [d[:2] for d in jaxprs.dots(qmatmul, x, w)] == [(dtype, dtype)]


def test_int8_products_accumulate_in_int32():
    """Sums beyond 2**24, which float32 would round."""
    w = cases.weight("int8 token / channel")
    program = jax.make_jaxpr(qmatmul)(cases.activations(), w)
    dot = next(e for e in jaxprs.equations(program) if e.primitive.name == "dot_general")
    assert dot.outvars[0].aval.dtype == jnp.int32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weight_only_products_run_in_the_dtype_of_x(dtype):
    x = jnp.asarray(cases.activations(), dtype)
    w = cases.weight("int4 g32")
    assert [d[:2] for d in jaxprs.dots(qmatmul, x, w)] == [(dtype, dtype)]
    assert qmatmul(x, w).dtype == x.dtype


def test_the_walk_finds_dots_in_loops_and_calls():
    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jax.jit(jnp.dot)(y, y), x)

    assert [d[:2] for d in jaxprs.dots(looped, jnp.eye(3))] == [("float32", "float32")]


@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act_order"])
@pytest.mark.parametrize(
    "name", ["int4 g32", "int3 g32 zero", "int8 token / channel", "fp8 tensor static / tensor"]
)
def test_gradient_in_x(name, act_order):
    """That of the dequantized weight, straight through the rounding of x where there is one."""
    w = cases.weight(name, act_order=act_order)
    x = jnp.asarray(cases.activations())
    weighting = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(qmatmul(x, w) * weighting)))(x)
    expected = weighting.astype(np.float64) @ oracle.weight(w).T
    assert problems.relative_error(gradient, expected) < 1e-6


def test_gradient_under_jit_and_vmap():
    w, x = cases.weight("int8 token / channel"), jnp.asarray(cases.activations())
    each = jax.jit(jax.vmap(jax.grad(lambda row: qmatmul(row, w).sum())))(x)
    expected = np.tile(oracle.weight(w).sum(1), (5, 1))
    assert problems.relative_error(each, expected) < 1e-6


@pytest.mark.parametrize("lead", [(), (5,), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("name", [*cases.FEW, "fp8 group / block", "int8 tensor / channel"])
def test_leading_axes(name, lead):
    x = np.broadcast_to(cases.activations(), (*lead[:-1], 5, 64))
    x = x[2] if lead == () else x
    y = cases.multiply(jnp.asarray(x), cases.weight(name))
    assert y.shape == (*lead, 48)
    expected = oracle.qmatmul(x.reshape(-1, 64), cases.weight(name)).reshape(*lead, 48)
    assert problems.relative_error(y, expected) < 1e-5


def test_plain_weights():
    x, w = cases.activations(), problems.weights(64, 48)
    y = qmatmul(jnp.asarray(x), jnp.asarray(w))
    assert problems.relative_error(y, x.astype(np.float64) @ w) < 1e-6
    narrow = qmatmul(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w))
    assert narrow.dtype == jnp.bfloat16


def test_sizes_must_fit():
    w = cases.weight("int4 g32")
    with pytest.raises(SpecError, match=r"\(5, 32\).*\(64, 48\)"):
        qmatmul(jnp.ones((5, 32)), w)
    stacked = jax.tree.map(lambda leaf: leaf[None], w)
    with pytest.raises(SpecError, match=r"\(1, 64, 48\)"):
        qmatmul(jnp.ones((5, 64)), stacked)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", [n for n in cases.EIGHT_BIT if "static" not in n])
def test_broken_activations_are_not_hidden(name, bad):
    """NaN has no int8 code: it must not come out as a plausible number."""
    x = cases.activations().copy()
    x[4, 7] = bad
    y = np.asarray(cases.multiply(jnp.asarray(x), cases.weight(name)))
    assert not np.isfinite(y[4]).any()


@pytest.mark.parametrize("name", cases.EIGHT_BIT)
@pytest.mark.parametrize("size", [1e-38, 1e4, 1e30])
def test_large_and_small_activations_stay_finite(name, size):
    x = cases.activations() * np.float32(size / 40)
    assert np.isfinite(cases.multiply(jnp.asarray(x), cases.weight(name))).all()
