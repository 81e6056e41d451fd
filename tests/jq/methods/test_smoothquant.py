"""SmoothQuant's formula and the sweep over alpha, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.errors import SpecError
from jq.methods import smoothquant
from jq.methods.smoothquant import AUTO_ALPHAS, SmoothQuant
from jq.spec import FP8, w8a8
from tests.jq import problems
from tests.oracles import qmatmul
from tests.oracles import smoothquant as oracle


def problem(seed: int, k: int = 32, n: int = 8, tokens: int = 40):
    """(x [T, K] with outlier channels, two weights [K, N])."""
    x = problems.inputs(k, tokens, seed)
    x[:, [2, 9]] *= 30
    return x, [problems.weights(k, n, seed + 1), problems.weights(k, n // 2, seed + 2)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_equation_four(alpha):
    x, weights = problem(0)
    x[:, 5] = 0
    weights[0][7], weights[1][7] = 0, 0
    w_max = smoothquant.weight_max([jnp.asarray(w) for w in weights])
    found = smoothquant.smoothing_scale(alpha, jnp.abs(x).max(0), w_max)
    np.testing.assert_allclose(found, oracle.scale(alpha, x, weights), rtol=1e-5)
    assert found[5] == found[7] == 1


def test_the_ends_of_alpha():
    """alpha 1 makes every input channel as large as any other, alpha 0 every weight row."""
    x, weights = problem(1)
    x_max, w_max = jnp.abs(x).max(0), smoothquant.weight_max([jnp.asarray(w) for w in weights])
    inputs = x_max / smoothquant.smoothing_scale(1.0, x_max, w_max)
    rows = w_max * smoothquant.smoothing_scale(0.0, x_max, w_max)
    np.testing.assert_allclose(inputs, 1, rtol=1e-5)
    np.testing.assert_allclose(rows, 1, rtol=1e-5)
    even = smoothquant.smoothing_scale(0.5, x_max, w_max)
    np.testing.assert_allclose(x_max / even, w_max * even, rtol=1e-5)


SPECS = {
    "int8 token": w8a8(),
    "int8 tensor": w8a8(activation="tensor"),
    "fp8 token": w8a8(FP8),
    "fp8 tensor": w8a8(FP8, activation="tensor", weight="tensor"),
}


@pytest.mark.parametrize("name", SPECS)
def test_activations_are_rounded_as_the_matmul_does(name):
    x, _ = problem(2)
    found = smoothquant.fake_activations(jnp.asarray(x), SPECS[name])
    assert problems.relative_error(found, qmatmul.activations(x, SPECS[name])) < 1e-6


@functools.partial(jax.jit, static_argnames="spec")
def search(x, weights, spec):
    loss = smoothquant.output_loss(weights, x, spec)
    return smoothquant.search_alpha(jnp.abs(x).max(0), smoothquant.weight_max(weights), loss)


@pytest.mark.parametrize("name", SPECS)
def test_auto_takes_the_best_alpha(name):
    x, weights = problem(3)
    # Rounded scales: with unrounded ones each column's lowest weight is a tie, see test_gptq.
    spec = dataclasses.replace(SPECS[name], scale_dtype="bfloat16")
    scale, alpha, losses = search(x, weights, spec)
    scales = [np.ones(x.shape[1]), *(oracle.scale(a, x, weights) for a in AUTO_ALPHAS)]
    expected = np.array([oracle.loss(x, weights, s, spec) for s in scales])
    np.testing.assert_allclose(losses, expected, rtol=3e-3)
    # Two alphas may be as good as each other; the one that was taken is as good as the best.
    chosen = int(np.argmin(np.asarray(losses)))
    assert expected[chosen] <= expected.min() * (1 + 1e-3)
    assert alpha == pytest.approx((np.nan, *AUTO_ALPHAS)[chosen], nan_ok=True)
    np.testing.assert_allclose(scale, scales[chosen], rtol=1e-5)


def test_smoothing_helps_where_the_paper_says():
    """Outlier channels and one scale for all of x: smoothing takes most of the error away."""
    x, weights = problem(4)
    _, alpha, losses = search(x, weights, SPECS["int8 tensor"])
    unsmoothed = oracle.loss(x, weights, np.ones(32), SPECS["int8 tensor"])
    assert losses.min() < 0.3 * unsmoothed
    assert alpha > 0


def test_auto_leaves_alone_what_no_alpha_helps():
    x_max, w_max = jnp.asarray([1.0, 2.0, 8.0]), jnp.asarray([0.5, 3.0, 1.0])
    scale, alpha, losses = smoothquant.search_alpha(
        x_max, w_max, lambda scale: jnp.sum(jnp.square(scale - 1.0))
    )
    assert np.isnan(alpha)
    np.testing.assert_array_equal(scale, np.ones(3))
    assert losses.shape == (1 + len(AUTO_ALPHAS),)
    assert losses[0] == 0 < losses[1:].min()


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_is_an_exponent(alpha):
    with pytest.raises(SpecError, match=f"alpha {alpha}"):
        SmoothQuant(alpha=alpha)
    assert SmoothQuant(alpha="auto").needs_statistics
