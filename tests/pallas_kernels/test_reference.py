"""The XLA reference keeps the contract, and its pieces are right on their own."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq.pallas_kernels import reference
from tests.jq import cases, problems
from tests.oracles import qmatmul as oracle
from tests.pallas_kernels.contract import Backend, MatmulContract


class TestReference(MatmulContract):
    """On a CPU `qmatmul` chooses the reference."""

    backend = Backend("reference", cases.multiply)


@pytest.mark.parametrize("name", cases.EIGHT_BIT)
def test_activations(name):
    """Codes times scales, against float64."""
    spec, x = cases.ALL[name].activation, cases.activations()
    dtype = jnp.dtype(spec.dtype)
    grouped = x.reshape(5, 4, 16) if spec.granularity == "group" else x
    axes = None if spec.granularity == "tensor" else -1
    scale = reference.activation_scale(jnp.asarray(grouped), dtype, axes)
    static = cases.weight(name).input_scale
    if static is not None:
        scale = static
    codes = reference.quantize_activations(jnp.asarray(grouped), scale, dtype)
    assert codes.dtype == dtype
    back = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
    expected = oracle.activations(x, cases.ALL[name], None if static is None else float(static))
    assert problems.relative_error(back.reshape(5, 64), expected) < 1e-6


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_activations_beyond_the_range_are_clipped(dtype):
    """A static scale is smaller than an outlier: no NaN, no wrapping around."""
    x = jnp.array([1e4, -1e4, 3e38, -3e38, 1.0, 0.0])
    codes = reference.quantize_activations(x, jnp.float32(1.0), jnp.dtype(dtype))
    top = 127 if dtype == "int8" else 448
    np.testing.assert_array_equal(np.asarray(codes, np.float32), [top, -top, top, -top, 1, 0])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_scales_of_nothing_and_of_nan(dtype):
    x = jnp.array([[0.0, 0.0], [1.0, jnp.nan], [2.0, -4.0]])
    scale = np.asarray(reference.activation_scale(x, jnp.dtype(dtype), -1))[:, 0]
    assert scale[0] == 1
    assert np.isnan(scale[1])
    assert scale[2] == pytest.approx(4 / (127 if dtype == "int8" else 448), rel=1e-6)


def test_int8_sums_are_exact():
    """Every product at its largest: the sum is far beyond what float32 counts exactly."""
    k = 4096
    x, w = np.full((1, k), 127, np.int8), np.full((k, 1), -127, np.int8)
    x[0, 0] = 1
    total = reference.dot(jnp.asarray(x), jnp.asarray(w), jnp.int32)
    assert int(total[0, 0]) == int(x[0].astype(int) @ w[:, 0].astype(int))
