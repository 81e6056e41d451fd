"""Running a stage over all samples: order, padding, batches, what is dequantized when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import statistics
from jq.calib.stages import Stream, prepare_block, ready, run_stage
from jq.methods.rtn import rtn_quantize
from jq.spec import QuantSpec, w8a8
from tests.calib import toy
from tests.jq import problems

pytestmark = pytest.mark.usefixtures("fast_compiles")

SAMPLES, LENGTH, WIDTH = 4, 6, toy.WIDTH
# The linear is there to tell how wide the statistics are.
GAIN = {
    "gain": {"scale": jnp.full(WIDTH, 2.0)},
    "up": {"kernel": jnp.zeros((WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)},
}


def stream(mask=None, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal((SAMPLES, LENGTH, WIDTH)) * scale
    return Stream(jnp.asarray(x, jnp.float32), None, None if mask is None else jnp.asarray(mask))


def kernel(spec=None):
    w = jnp.asarray(problems.weights(WIDTH, WIDTH))
    return w if spec is None else rtn_quantize(w, spec).to_qtensor(spec)


def run(index, params, given, *, batch_size=None, collect=False):
    """With a batch size, the stream stays on the host."""
    if batch_size is None:
        return run_stage(toy.Toy(), None, index, params, given, collect=collect)
    given = jax.device_get(given)
    result = run_stage(
        toy.Toy(), None, index, params, given, collect=collect, batch_size=batch_size
    )
    assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(result.stream))
    return result


def two_stages(spec, given, batch_size):
    params = GAIN | {"up": {"kernel": kernel(spec), "bias": jnp.ones(WIDTH)}}
    middle = run(0, params, given, batch_size=batch_size)
    return run(1, params, middle.stream, batch_size=batch_size).stream.x


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 4, 100])
def test_statistics_are_those_of_the_output(batch_size):
    given = stream()
    result = run(0, GAIN, given, batch_size=batch_size, collect=True)
    np.testing.assert_array_equal(result.stream.x, 2 * given.x)
    np.testing.assert_array_equal(result.stream.carry["residual"], given.x)
    x = 2 * np.asarray(given.x, np.float64).reshape(-1, WIDTH)
    assert problems.relative_error(result.stats.gram, x.T @ x) < 1e-6
    np.testing.assert_array_equal(result.stats.gram, result.stats.gram.T)
    np.testing.assert_allclose(result.stats.abs_sum, np.abs(x).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(result.stats.abs_max, np.abs(x).max(0).astype(np.float32))
    assert result.stats.count == SAMPLES * LENGTH
    one = run(0, GAIN, given, collect=True)
    for left, right in zip(result.stats, one.stats, strict=True):
        np.testing.assert_array_equal(left, right)


def test_statistics_are_added_in_the_order_of_the_samples():
    stats = statistics.init(WIDTH)
    update = jax.jit(statistics.update)
    given = stream()
    for sample in 2 * given.x:
        stats = update(stats, sample)
    result = run(0, GAIN, given, batch_size=2, collect=True)
    np.testing.assert_array_equal(result.stats.gram, statistics.finish(stats).gram)
    turned = run(0, GAIN, given._replace(x=given.x[::-1]), batch_size=2, collect=True)
    assert problems.relative_error(turned.stats.gram, result.stats.gram) < 1e-6
    assert not np.array_equal(turned.stats.gram, result.stats.gram)


def test_padding_is_left_out():
    mask = np.ones((SAMPLES, LENGTH), bool)
    mask[0, 4:] = mask[2, :3] = mask[3, 1] = False
    given = stream(mask)
    padded = given._replace(x=jnp.where(given.mask[:, :, None], given.x, jnp.float32(1e6)))
    result = run(0, GAIN, padded, batch_size=2, collect=True)
    x = 2 * np.asarray(given.x, np.float64)[mask]
    assert int(result.stats.count) == mask.sum()
    assert problems.relative_error(result.stats.gram, x.T @ x) < 1e-6
    np.testing.assert_array_equal(result.stats.abs_max, np.abs(x).max(0).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_told(bad):
    given = stream()
    given = given._replace(x=given.x.at[2, 1, 3].set(bad))
    for batch_size in (None, 1, 4):
        result = run(0, GAIN, given, batch_size=batch_size)
        np.testing.assert_array_equal(result.finite, [True, True, False, True])
    mask = jnp.ones((SAMPLES, LENGTH), bool).at[2, 1].set(False)
    assert run(0, GAIN, given._replace(mask=mask)).finite.all()


def test_large_numbers_are_finite():
    assert run(0, GAIN, stream(scale=3e37)).finite.all()


@pytest.mark.parametrize(
    "spec",
    [
        *[None, QuantSpec("int4", 8, False), w8a8(), w8a8("float8_e4m3fn")],
        *[w8a8(activation="tensor"), w8a8("float8_e4m3fn", activation="tensor")],
    ],
)
def test_a_sample_does_not_depend_on_its_batch(spec):
    given = stream()
    # Samples of very different size: a scale over the whole batch would show.
    given = given._replace(x=given.x * jnp.asarray([1, 10, 100, 1000.0])[:, None, None])
    alone = two_stages(spec, given, None)
    for batch_size in (1, 2, 4):
        np.testing.assert_array_equal(two_stages(spec, given, batch_size), alone)


def test_padding_does_not_scale_activations():
    mask = np.ones((SAMPLES, LENGTH), bool)
    mask[:, 4:] = False
    given = stream(mask)
    loud = given._replace(x=jnp.where(given.mask[:, :, None], given.x, jnp.float32(1e4)))
    spec = w8a8(activation="tensor")
    real, other = (two_stages(spec, s, None)[:, :4] for s in (given, loud))
    np.testing.assert_array_equal(real, other)


def test_kernels_become_plain_arrays_and_8_bit_tensors_stay():
    weight_only, eight_bit = QuantSpec("int4", 8), w8a8()
    params = {"a": kernel(weight_only), "b": {"c": kernel(eight_bit)}, "d": kernel()}
    plain = ready(params, jnp.bfloat16)
    assert plain["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(plain["a"], params["a"].dequantize(jnp.bfloat16))
    assert plain["b"]["c"] is params["b"]["c"]
    assert plain["d"] is params["d"]
    narrow = ready({"kernel": kernel(), "bias": kernel()}, jnp.bfloat16)
    assert (narrow["kernel"].dtype, narrow["bias"].dtype) == (jnp.bfloat16, jnp.float32)


def test_blocks_are_prepared_and_checked():
    params = {
        "norm": {"scale": jnp.ones(3, jnp.bfloat16)},
        "linear": {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.ones(2, jnp.float16)},
    }
    same, _ = prepare_block(params, None)
    assert same["linear"]["kernel"].dtype == jnp.bfloat16
    wide, finite = prepare_block(params, jnp.float32)
    assert wide["linear"]["kernel"].dtype == jnp.float32
    assert wide["linear"]["bias"].dtype == jnp.float16
    assert wide["norm"]["scale"].dtype == jnp.bfloat16
    assert all(jax.tree.leaves(finite))
    for bad in (np.nan, np.inf):
        params["linear"]["kernel"] = params["linear"]["kernel"].at[1, 1].set(bad)
        _, finite = prepare_block(params, jnp.float32)
        assert not finite["linear"]["kernel"]
        assert finite["linear"]["bias"]
        assert finite["norm"]["scale"]
