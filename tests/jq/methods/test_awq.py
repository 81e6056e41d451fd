"""AWQ's search against float64, on the tokens instead of their Gram matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import grid
from jq.errors import SpecError
from jq.methods import awq
from jq.methods.awq import AWQ
from jq.methods.rtn import RTN
from jq.spec import QuantSpec
from tests.jq import problems
from tests.oracles import awq as oracle
from tests.oracles import rtn
from tests.oracles.formats import format_of

SPEC = QuantSpec("int3", 16)


def problem(seed: int, k: int = 48, n: int = 8):
    """(x [T, K], two weights [K, N]) in float32."""
    x = problems.inputs(k, 3 * k, seed)
    return x, [problems.weights(k, n, seed + 1), problems.weights(k, n // 2, seed + 2)]


@functools.partial(jax.jit, static_argnames=("spec", "n_grid", "duo"))
def search(x, weights, spec, n_grid, duo=True):
    gram = jnp.dot(x.T, x, precision=jax.lax.Precision.HIGHEST)
    magnitude = awq.weight_magnitude(weights, spec) if duo else None
    loss = awq.gram_loss(weights, gram, spec)
    return awq.search_scale(jnp.abs(x).mean(0), magnitude, loss, n_grid)


@pytest.mark.parametrize("group_size", [16, -1])
def test_weight_magnitude(group_size):
    _, weights = problem(0)
    weights[0][:16] = 0  # a whole group of zeros in one of the linears
    found = awq.weight_magnitude([jnp.asarray(w) for w in weights], QuantSpec("int4", group_size))
    expected = oracle.weight_magnitude(weights, group_size)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("exponent", [0.0, 0.35, 1.0])
def test_scales(exponent, duo):
    x, weights = problem(1)
    abs_mean = np.abs(x).mean(0)
    abs_mean[[3, 20]] = 0
    magnitude = oracle.weight_magnitude(weights, 16).astype(np.float32)
    found = awq.scale_of(exponent, jnp.asarray(abs_mean), jnp.asarray(magnitude) if duo else None)
    expected = oracle.scale(exponent, abs_mean, magnitude if duo else None)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[3] == found[20] == 1
    alive = np.asarray(found)[abs_mean > 0]
    assert alive.max() * alive.min() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("spec", [SPEC, QuantSpec("int4", -1, symmetric=False)])
def test_the_search_picks_the_oracles_exponent(spec, duo):
    picked = []
    for seed in (0, 10, 20):
        x, weights = problem(seed)
        scale, losses, best = search(x, weights, spec, 20, duo)
        expected, scales = oracle.losses(x, weights, format_of(spec), spec.group_size, 20, duo=duo)
        # The losses agree to what single weights at rounding boundaries make.
        np.testing.assert_allclose(losses, expected, rtol=2e-3)
        runner_up = np.sort(expected)[1]
        assert runner_up > expected.min() * (1 + 5e-4), "a seed without a clear winner"
        assert best == np.argmin(expected)
        np.testing.assert_allclose(scale, scales[int(best)], rtol=1e-5)
        assert losses[best] < losses[0]
        picked.append(int(best))
    assert len(set(picked)) > 1  # the answer depends on the problem


def test_no_scaling_is_one_of_the_choices():
    """Weights that are on their grid already: nothing can only be lost."""
    points = (np.arange(1, 15) - 8) * 2 / 15
    w = np.random.default_rng(1).choice(points, (16, 4)).astype(np.float32)
    w[0] = -1.0 * 8 / 7.5  # one step beyond: the grid's lowest point, and its scale 2 / 15
    spec = QuantSpec("int4", 16, symmetric=False, scale_dtype="float32")
    w[1] = w[0] + 2.0  # fifteen steps above
    x = np.random.default_rng(0).lognormal(0, 1, (64, 16)).astype(np.float32)
    scale, losses, best = search(x, [w], spec, 20)
    assert best == 0
    assert losses[0] < 1e-6 * losses[1:].min()
    np.testing.assert_array_equal(scale, 1)


def test_effective_weights():
    _, weights = problem(2)
    s = np.random.default_rng(0).lognormal(0, 1, 48).astype(np.float32)
    found = grid.effective_weight(jnp.asarray(weights[0]), jnp.asarray(s), SPEC)
    fmt = format_of(SPEC)
    expected = rtn.dequantize(rtn.quantize(weights[0] * s[:, None], fmt, 16), fmt) / s[:, None]
    assert problems.relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_statistics_without_a_meaning(fill):
    """All channels dead, or statistics broken: scales of one, not NaN."""
    _, weights = problem(3)
    abs_mean = jnp.zeros(48)
    gram = jnp.full((48, 48), fill)
    loss = awq.gram_loss([jnp.asarray(w) for w in weights], gram, SPEC)
    magnitude = awq.weight_magnitude([jnp.asarray(w) for w in weights], SPEC)
    scale, _, _ = awq.search_scale(abs_mean, magnitude, loss, 5)
    np.testing.assert_array_equal(scale, 1)


def test_scales_stay_in_the_range_of_16_bits():
    abs_mean = jnp.asarray(np.geomspace(1e-30, 1e30, 16, dtype=np.float32))
    scale = np.asarray(awq.scale_of(1.0, abs_mean, None))
    assert scale.min() >= 1e-4
    assert scale.max() <= 1e4


@pytest.mark.parametrize("options", [{"n_grid": 0}, {"exponent": -0.1}, {"exponent": 1.1}])
def test_contradictory_options(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        AWQ(**options)
    assert AWQ().needs_statistics
    assert AWQ().rounding == RTN(clip="output")
