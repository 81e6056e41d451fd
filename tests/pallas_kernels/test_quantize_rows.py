"""Codes and scales of activations: the reference in float32, the kernel's schedule, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.pallas_kernels import quantize_rows_kernel as kernel
from jq.pallas_kernels import reference
from jq.pallas_kernels.quantize_rows import (
    quantize_rows,
    quantize_rows_reference,
    supported_rows,
    vector_size,
)
from jq.spec import FP8
from tests.pallas_kernels import interpreted_rows, interpreting
from tests.pallas_kernels.interpreted_rows import activations

LARGEST = {"int8": 127, FP8: 448}


def expected(x, codes: str, group: int | None):
    """(codes, scale) with float32 operations, each rounded as IEEE says."""
    parts = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, group or x.shape[-1])
    scale = np.abs(parts).max(-1) * (np.float32(1) / np.float32(LARGEST[codes]))
    scale[scale == 0] = 1
    products = (parts * (np.float32(1) / scale)[..., None]).reshape(x.shape)
    rounded = np.rint(products).astype(np.int8) if codes == "int8" else products.astype(FP8)
    return rounded, scale


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("codes", ["int8", FP8])
@pytest.mark.parametrize("group", [None, 128, 32])
def test_reference(codes, group):
    """Every operation is rounded once, compiled or not, so that other backends can be equal."""
    x = activations(5, 384)
    wanted = expected(x, codes, group)
    assert_equal(quantize_rows_reference(x, codes, group=group), wanted)
    compiled = jax.jit(lambda x: quantize_rows_reference(x, codes, group=group))
    assert_equal(compiled(x), wanted)


def test_reference_with_a_norm():
    x, gain = activations(3, 256), jnp.linspace(0.5, 2, 256, dtype=jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    y = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(gain, np.float64)
    got = np.asarray(reference.rms_norm(x, gain, 1e-5), np.float64)
    assert np.all(np.abs(got - y) <= 2.0**-8 * np.abs(y))
    normed = reference.rms_norm(x, gain, 1e-5)
    got = quantize_rows_reference(x, "int8", norm=(gain, 1e-5))
    assert_equal(got, quantize_rows_reference(normed, "int8"))


@pytest.fixture(scope="module")
def interpretations():
    """Case's name -> how the interpreted kernel's result differs from the reference's."""
    return interpreting.interpretations(interpreted_rows)


@pytest.mark.slow
@pytest.mark.parametrize("case", interpreted_rows.CASES, ids=lambda case: case.name)
def test_schedule(interpretations, case):
    result = interpretations[case.name]
    assert not result["races"]
    if case.norm:
        # Sums in another order: a value may round to its neighbour, and so may its code.
        assert result["steps"] <= 1
        assert result["different"] < 0.01
        assert result["scale"] < 2.0**-7
    else:
        assert result["different"] == result["scale"] == 0


@pytest.mark.slow
def test_rows_below_the_smallest_count_as_zeros_and_nan_reaches_the_scale(interpretations):
    assert interpretations["special"]["scales"] == ["1.0", "nan", "0.007874015718698502"]
    assert interpretations["special"]["codes"] == [0, 127]


def test_the_magic_sum_rounds_to_nearest_even():
    """Every quarter from -128 to 128 and its float32 neighbours, and products of all sizes."""
    quarters = np.arange(-512, 513, dtype=np.float32) / 4
    x = np.concatenate([quarters, *(np.nextafter(quarters, np.float32(s)) for s in (-999, 999))])
    x = np.concatenate([x, np.random.default_rng(0).uniform(-127, 127, 100_000)]).astype(np.float32)
    magic = np.array(kernel.MAGIC, np.uint32).view(np.float32)
    low = (x + magic).view(np.uint32).astype(np.uint8).view(np.int8)
    inside = np.abs(x) <= 127.25
    np.testing.assert_array_equal(low[inside], np.rint(x[inside]).astype(np.int8))


@pytest.mark.parametrize("codes", ["int8", FP8])
def test_no_quotient_leaves_the_codes(codes):
    """largest * (1 / scale) stays within half a step of the largest code, for every bfloat16."""
    bits = np.arange(0x1F80, 0x7F80, dtype=np.uint32) << 16
    largest = bits.view(np.float32)
    assert largest[0] <= 2.0**-64
    scale = largest * (np.float32(1) / np.float32(LARGEST[codes]))
    top = largest * (np.float32(1) / scale)
    assert np.all(np.isfinite(top))
    assert np.all(np.abs(top - LARGEST[codes]) < 1e-4)


def test_what_is_supported():
    assert supported_rows(4096, "bfloat16", "int8", (8, 0)) is None
    assert supported_rows(4096, "bfloat16", FP8, (9, 0), group=128) is None
    for k in (32768, 28672, 13696):
        assert supported_rows(k, "bfloat16", "int8", (9, 0)) is None
    for arguments, options, said in (
        ((4096, "bfloat16", FP8, (8, 6)), {}, "float8"),
        ((4096, "bfloat16", "int8", (7, 5)), {}, "7.5"),
        ((4000, "bfloat16", "int8", (9, 0)), {}, "4000"),
        ((65536, "bfloat16", "int8", (9, 0)), {}, "131072 bytes"),
        ((29568, "bfloat16", "int8", (9, 0)), {}, "118272 bytes"),
        ((32768, "bfloat16", "int8", (9, 0)), {"norm": True}, "65536 bytes"),
        ((4096, "float64", "int8", (9, 0)), {}, "float64"),
        ((4096, "bfloat16", "int4", (9, 0)), {}, "int4"),
        ((4096, "bfloat16", FP8, (9, 0)), {"group": 64}, "64"),
        ((4096, "bfloat16", FP8, (9, 0)), {"group": 128, "norm": True}, "norm"),
    ):
        assert said in supported_rows(*arguments, **options)
    with pytest.raises(ValueError, match="100"):
        quantize_rows(jnp.ones((2, 100)), "int8")


@pytest.mark.parametrize(
    ("k", "dtype", "size"),
    [(4096, "bfloat16", 8), (11008, "bfloat16", 2), (896, "bfloat16", 1), (4096, "float32", 4)],
)
def test_vectors_divide_the_row(k, dtype, size):
    assert vector_size(k, dtype) == size
    assert k % (128 * size) == 0


def test_no_rows():
    codes, scale = quantize_rows(jnp.zeros((0, 2, 128)), "int8")
    assert (codes.shape, scale.shape) == ((0, 2, 128), (0, 2, 1))
