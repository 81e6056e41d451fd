"""Statistics of inputs, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jq import statistics
from tests.jq import jaxprs, problems

update, finish = jax.jit(statistics.update), jax.jit(statistics.finish)


def collect(x, mask=None, size=8):
    stats = statistics.init(x.shape[1])
    for first in range(0, len(x), size):
        some = slice(first, first + size)
        part = None if mask is None else jnp.asarray(mask[some])
        stats = update(stats, jnp.asarray(x[some]), part)
    return finish(stats)


@pytest.mark.parametrize("k", [12, 64 * statistics.PANELS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums(dtype, k):
    x = np.asarray(jnp.asarray(problems.inputs(k, 40), dtype))
    stats, exact = collect(x), x.astype(np.float64)
    assert all(leaf.dtype == jnp.float32 for leaf in stats)
    assert problems.relative_error(stats.gram, exact.T @ exact) < 1e-6
    assert problems.relative_error(stats.abs_sum, np.abs(exact).sum(0)) < 1e-6
    assert problems.relative_error(stats.abs_mean, np.abs(exact).mean(0)) < 1e-6
    np.testing.assert_array_equal(stats.abs_max, np.abs(exact).max(0))
    assert stats.count == 40


@pytest.mark.parametrize("k", [12, 64 * statistics.PANELS])
def test_energy_of_outputs(k):
    x, w = problems.inputs(k, 3 * k), problems.weights(k, 7)
    energy = statistics.output_energy(collect(x, size=len(x)).gram, jnp.asarray(w))
    expected = np.square(x.astype(np.float64) @ w.astype(np.float64)).sum(0)
    np.testing.assert_allclose(energy, expected, rtol=2e-6)


def test_padding_is_left_out():
    x = problems.inputs(12, 40)
    mask = np.random.default_rng(0).random(40) < 0.6
    broken = x.copy()
    broken[~mask] = np.nan  # whatever padding holds
    masked, only = collect(broken, mask), collect(x[mask], size=40)
    for found, expected in zip(masked, only, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-4)
    assert float(masked.count) == mask.sum()


def test_nothing_seen():
    stats = collect(problems.inputs(4, 8), np.zeros(8, bool))
    assert all(not np.asarray(leaf).any() for leaf in stats)
    np.testing.assert_array_equal(stats.abs_mean, 0)


def test_many_bfloat16_tokens_lose_nothing():
    """Sums beyond what bfloat16 can count."""
    stats = statistics.init(2)
    for _ in range(3):
        stats = update(stats, jnp.ones((1000, 2), jnp.bfloat16))
    np.testing.assert_array_equal(finish(stats).gram, 3000)
    np.testing.assert_array_equal(stats.abs_sum, 3000)


def test_products_are_not_cut_to_tf32():
    x = jnp.ones((4, 64 * statistics.PANELS))
    found = jaxprs.dots(statistics.update, statistics.init(x.shape[1]), x)
    assert len(found) == statistics.PANELS
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert {precision for _, _, precision in found} == {highest}


def test_gram_matrices_are_symmetric():
    gram = np.asarray(collect(problems.inputs(64 * statistics.PANELS, 16)).gram)
    np.testing.assert_array_equal(gram, gram.T)


def test_rescaling_is_dividing_the_inputs():
    x = problems.inputs(12, 40)
    scale = np.random.default_rng(1).lognormal(0, 1, 12).astype(np.float32)
    found = statistics.rescale(collect(x), jnp.asarray(scale))
    expected = collect(x / scale)
    for a, b in zip(found, expected, strict=True):
        assert problems.relative_error(a, b) < 1e-6
