"""The rounding rules, against one-number-at-a-time float64 and at their ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import grid
from jq.spec import FP8, QuantSpec
from tests.jq import problems
from tests.oracles import formats, rtn

F32 = np.float32


def spec_of(dtype="int4", symmetric=True, scale_dtype="bfloat16", **more) -> QuantSpec:
    return QuantSpec(dtype, symmetric=symmetric, scale_dtype=scale_dtype, **more)


@functools.partial(jax.jit, static_argnames="spec")
def _round_trip(groups, spec):
    scale, zero = grid.scale_and_zero(*grid.weight_range(groups, spec), spec)
    codes = grid.encode(groups, scale, zero, spec)
    back = grid.decode(codes, scale, zero, spec)
    return scale, zero, codes, back, grid.fake_quantize(groups, scale, zero, spec)


def round_trip(w, spec):
    """(scale, zero, codes, weights back) of one group of weights [g, N], as NumPy arrays."""
    *found, fake = _round_trip(jnp.asarray(w, jnp.float32)[None], spec)
    np.testing.assert_array_equal(fake, found[-1])
    return tuple(np.asarray(a[0]) for a in found)


FORMATS = [("int2", True), ("int3", False), ("int4", True), ("int8", False), (FP8, True)]


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
def test_scales_zeros_and_codes(dtype, symmetric, scale_dtype):
    spec = spec_of(dtype, symmetric, scale_dtype)
    w = problems.weights(24, 40, 3)
    scale, zero, codes, _ = round_trip(w, spec)
    expected = rtn.quantize(w, formats.format_of(spec), -1)
    np.testing.assert_array_equal(scale, expected.scale)
    np.testing.assert_array_equal(zero, expected.zero)
    problems.count_ties(codes, expected.codes, expected.margins)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_codes_are_made_with_the_stored_scale(scale_dtype):
    """Codes are the nearest on the grid of the rounded scale, which is not the unrounded one's."""
    spec = spec_of("int8", True, scale_dtype)
    w = problems.weights(64, 20, 5)
    scale, _, codes, _ = round_trip(w, spec)
    unrounded = 2 * np.abs(w.astype(np.float64)).max(0) / 255
    assert np.mean(np.abs(scale[0] / unrounded - 1) > 1e-5) > 0.9
    stored = jnp.asarray(scale, scale_dtype).astype(jnp.float32)
    np.testing.assert_array_equal(stored, scale)
    distance = np.abs(w / scale.astype(np.float64) - (codes.astype(float) - 128))
    inside = (codes > 0) & (codes < 255)
    assert distance[inside].max() < 0.5 + problems.TIE
    other = np.clip(np.round(w / unrounded), -128, 127) + 128
    assert (other != codes).any()


@pytest.mark.parametrize("kept", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
def test_groups_of_zeros_come_back_as_zeros(dtype, symmetric, kept):
    scale, zero, _, back = round_trip(np.zeros((8, 3), F32), spec_of(dtype, symmetric, kept))
    assert (scale == 1).all()
    np.testing.assert_array_equal(back, 0)
    assert np.isfinite(zero).all()


@pytest.mark.parametrize("value", [3.7, -3.7])
@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
def test_constant_groups(dtype, symmetric, value):
    """Constant groups come back to within what rounding their scale costs."""
    spec = spec_of(dtype, symmetric, "float32")
    *_, back = round_trip(np.full((8, 3), value, F32), spec)
    # A symmetric grid ends half a step inside the range on the positive side.
    top = 1 if not symmetric or spec.is_float else 1 - 1 / (2**spec.bits - 1)
    bottom = 1 if not symmetric or spec.is_float else 1 + 1 / (2**spec.bits - 1)
    allowed = [top * value, bottom * value]
    nearest = min(abs(np.float64(back[0, 0]) / a - 1) for a in allowed)
    assert nearest < 1e-6
    assert (back == back[0, 0]).all()


@pytest.mark.parametrize("kept", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-12, 1e-7, 1e4, 1e12, 1e30, 3e38])
@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
def test_extreme_sizes_stay_finite(dtype, symmetric, size, kept):
    spec = spec_of(dtype, symmetric, kept)
    w = np.linspace(-1, 1, 16, dtype=F32)[:, None] * F32(size)
    scale, zero, codes, back = round_trip(w, spec)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert np.isfinite(zero).all()
    assert np.isfinite(codes.astype(F32)).all()
    assert np.isfinite(back).all()
    largest_step = 2 * size / (2**spec.bits - 1)
    if 1e-5 < largest_step < 6e4 and not spec.is_float:  # every scale dtype can say this one
        assert np.abs(back - w).max() < 0.51 * largest_step


def test_the_range_of_an_asymmetric_grid_contains_zero():
    """Zero is a grid point: a channel that is off stays off."""
    spec = spec_of("int4", False)
    w = problems.weights(16, 8, 1) + F32(5)  # nothing below zero
    w[3] = 0
    _, zero, _, back = round_trip(np.abs(w), spec)
    assert (zero == 0).all()
    np.testing.assert_array_equal(back[3], 0)
    _, zero, _, back = round_trip(-np.abs(w), spec)
    assert (zero == 15).all()
    np.testing.assert_array_equal(back[3], 0)


def test_float8_saturates_without_nan():
    spec = spec_of(FP8)
    scale = jnp.ones((1, 1, 1))
    w = jnp.array([448.0, 449.0, 1e4, 3e38, -448.0, -465.0, -1e30, 0.0])[None, :, None]
    codes = grid.encode(w, scale, jnp.zeros((1, 1, 1)), spec).astype(jnp.float32)
    np.testing.assert_array_equal(codes.ravel(), [448, 448, 448, 448, -448, -448, -448, 0])


def test_float8_codes_are_the_nearest():
    spec = spec_of(FP8, scale_dtype="float32")
    w = np.geomspace(1e-4, 448, 500, dtype=F32)
    ones = jnp.ones((1, 1, 1))
    codes = grid.encode(jnp.asarray(w)[None, :, None], ones, ones, spec)
    values, margins = zip(
        *(formats.nearest(x, 1.0, 0.0, formats.Format(None)) for x in w), strict=True
    )
    problems.count_ties(np.asarray(codes).ravel(), np.array(values), np.array(margins))


@pytest.mark.parametrize(("granularity", "size"), [("tensor", -1), ("block", 8)])
def test_outputs_that_share_a_scale(granularity, size):
    spec = QuantSpec(FP8, size, granularity=granularity)
    w = problems.weights(8, 24, 4)
    scale, *_ = round_trip(w, spec)
    expected = rtn.quantize(w, formats.format_of(spec), -1, shared=24 if size == -1 else 8)
    np.testing.assert_array_equal(scale, expected.scale)
    assert len(np.unique(scale)) == (1 if size == -1 else 3)


@pytest.mark.parametrize("kept", ["bfloat16", "float16", "float32"])
def test_rounded_scales_are_positive_and_finite(kept):
    scale = jnp.array([0.0, 1e-45, 1e-38, 1e-8, 1.0, 7e4, 1e38, jnp.inf])
    rounded = np.asarray(grid.round_scale(scale, spec_of(scale_dtype=kept)))
    assert (rounded > 0).all()
    assert np.isfinite(rounded).all()
    assert (np.diff(rounded) >= 0).all()
    assert rounded[4] == 1
