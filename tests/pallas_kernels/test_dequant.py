"""Dequantization in registers, proved on numbers and on the layout of the registers.

The generated instructions are emulated in NumPy, on bits: AND, and packed FMA and multiplication,
which round the exact result once.  What remains for a GPU to show is that it does the same.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jq.pallas_kernels import dequant, layout, weight
from jq.pallas_kernels.compat import FRAGMENT, ROWS, plgpu
from tests.pallas_kernels import interpreted

FLOAT = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
MANTISSA = {"bfloat16": 7, "float16": 10}
DTYPES = tuple(FLOAT)


def number(bits, dtype):
    """float64 values of 16-bit patterns, subnormal ones included."""
    return np.asarray(bits, np.uint16).view(FLOAT[dtype]).astype(np.float64)


def rounded(values, dtype):
    """float64 to the nearest number of the dtype (ties to even), as float64.

    Each value has to be exact: a product of two such numbers, plus a third, is where the
    exponents are as close as here.
    """
    return np.asarray(values, np.float64).astype(FLOAT[dtype]).astype(np.float64)


def half(constant):
    """One half of a packed pair of constants, which are equal."""
    assert constant >> 16 == constant & 0xFFFF
    return constant & 0xFFFF


def converted(code, scale, offset, dtype, symmetric, high):
    """What the instructions make of codes, with float64 numbers for register contents."""
    c = dequant.constants(dtype)
    low_mask, high_mask = (half(mask) for mask in dequant.MASKS)
    # The nibble's neighbours are set, so that the mask has something to take away.
    bits = np.asarray(code, np.uint16) << (4 if high else 0)
    bits = (bits | (0xFF0F if high else 0xFFF0)) & (high_mask if high else low_mask)
    value = number(bits, dtype)
    if symmetric:
        c_offset = rounded(scale * number(half(c.minus_eight), dtype), dtype)
        if high:
            scale = rounded(scale * number(half(c.sixteenth), dtype), dtype)
        return rounded(value * scale + c_offset, dtype)
    difference = rounded(value * number(half(c.spread[high]), dtype) + offset, dtype)
    return rounded(difference * scale, dtype)


def mantissas(dtype):
    """Every number of the dtype in [1, 2), and 2."""
    count = 2 ** MANTISSA[dtype]
    return 1 + np.arange(count + 1) / count


def exponents(dtype):
    """Of a group's scale against the column's largest: those for which nothing is lost."""
    return range(-90, 1) if dtype == "bfloat16" else range(-3, 1)


@pytest.mark.parametrize("high", [False, True], ids=["low", "high"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_codes_are_rounded_once(dtype, high):
    """All codes, mantissas and exponents: round((u - 8) * scale), to the bit."""
    trick = weight.TRICKS[dtype]
    code = np.arange(16)[:, None]
    for exponent in exponents(dtype):
        t = mantissas(dtype) * 2.0**exponent
        got = converted(code, t * 2.0**trick.symmetric, None, dtype, True, high)
        exact = (code - 8.0) * t * 2.0 ** (trick.unit + trick.symmetric)
        np.testing.assert_array_equal(got, rounded(exact, dtype))


@pytest.mark.parametrize("high", [False, True], ids=["low", "high"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_with_zero_points_are_rounded_once(dtype, high):
    """All codes, zero points, mantissas and exponents: round((u - z) * scale), to the bit."""
    trick = weight.TRICKS[dtype]
    base = trick.unit + trick.zero[0]
    code, zero = np.arange(16)[:, None, None], np.arange(16)[None, :, None]
    offset = rounded(-zero * 2.0**base, dtype)
    np.testing.assert_array_equal(offset, -zero * 2.0**base)
    for exponent in exponents(dtype):
        t = mantissas(dtype) * 2.0**exponent
        got = converted(code, t * 2.0 ** trick.zero[1], offset, dtype, False, high)
        exact = (code - zero) * t * 2.0 ** (base + trick.zero[1])
        np.testing.assert_array_equal(got, rounded(exact, dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_groups_of_a_float16_column(symmetric):
    """Of scales far below a column's largest no more than 2^-17 of its largest weight is lost."""
    trick = weight.TRICKS["float16"]
    code = np.arange(16)[:, None]
    t = np.random.default_rng(0).uniform(1, 2, (1, 4000)) * 2.0 ** -np.arange(4, 24).repeat(200)
    power = trick.symmetric if symmetric else trick.zero[1]
    scale = rounded(t * 2.0**power, "float16")
    base = trick.unit + trick.zero[0]
    for high in (False, True):
        got = converted(code, scale, -8 * 2.0**base, "float16", symmetric, high)
        got = got * 2.0 ** trick.remainder(symmetric)
        bound = np.abs((code - 8) * t) * 2.0**-10 + 8 * 2.0**-17
        assert np.all(np.abs(got - (code - 8) * t) <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_sums_with_minus_zero(dtype):
    """Compute capability 8 multiplies by adding -0: no product changes, whatever its sign."""
    zeros = number(half(dequant.NEGATIVE_ZEROS), dtype)
    assert zeros == 0
    assert np.signbit(zeros)
    values = np.concatenate([mantissas(dtype), [0.0]]) * np.array([[1.0], [-1.0]])
    products = rounded(values[..., None] * 15, dtype)
    np.testing.assert_array_equal(rounded(values[..., None] * 15 + zeros, dtype), products)
    assert np.array_equal(np.signbit(products + zeros), np.signbit(products))


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants(dtype):
    """Powers of two as `weight` says, and the code 8 with a sign."""
    trick, c = weight.TRICKS[dtype], dequant.constants(dtype)
    assert number(half(c.sixteenth), dtype) == 1 / 16
    assert number(half(c.minus_eight), dtype) == -8 * 2.0**trick.unit
    assert number(half(c.spread[0]), dtype) == 2.0 ** trick.zero[0]
    assert number(half(c.spread[1]), dtype) == 2.0 ** (trick.zero[0] - 4)


def packed_codes():
    """[512 words, 8 nibbles]: which code of a tile, 64 k + n, each nibble holds."""
    identity = np.arange(64 * 64).reshape(64, 64)
    found = np.zeros((512, 8), int)
    for digit in range(3):
        words = layout.pack(jnp.asarray(identity >> 4 * digit & 15, jnp.uint8))
        words = np.asarray(words).view(np.uint32).reshape(512, 1)
        found += (words >> np.arange(0, 32, 4) & 15).astype(int) << 4 * digit
    return found


@pytest.mark.parametrize("mma", [False, True], ids=["wgmma", "mma"])
def test_registers_get_the_codes_of_their_place(mma):
    """Packed order and JAX's own description of the A operand agree, for each of 64 x 64 codes."""
    fragment, held = FRAGMENT.to_mgpu(), packed_codes()
    if mma:
        fragment = plgpu.Layout.MMA_LHS(jnp.bfloat16).to_mgpu()
    warps = [d for d in fragment.warp_dims if isinstance(d, int)]  # the rest repeats values
    shape = fragment.tiling.tile_shape((64, 64))
    in_thread = {*warps, *fragment.lane_dims, fragment.vector_dim}
    for k in range(64):
        for n in range(64):
            tiled = fragment.tiling.tile_indices((n, k))

            def index(dims, tiled=tiled):
                return int(np.ravel_multi_index([tiled[d] for d in dims], [shape[d] for d in dims]))

            thread = 32 * index(warps) + index(fragment.lane_dims)
            dims = range(-len(tiled), 0)
            register = tuple(0 if d in in_thread else tiled[d] for d in dims)
            word, nibble = dequant.source(register, mma)
            # A thread loads four words of the tile; a pair's second code is four nibbles on.
            assert held[4 * thread + word, nibble + 4 * tiled[fragment.vector_dim]] == 64 * k + n


def test_rows_of_scales_belong_to_the_registers_rows():
    """A thread's two scales are those of columns g and g + 8 of its warp's 16."""
    rows, fragment = ROWS.to_mgpu(), FRAGMENT.to_mgpu()
    assert rows == fragment.reduce((1,))
    assert rows == plgpu.Layout.MMA_ACC(jnp.bfloat16).to_mgpu().reduce((1,))
    assert rows.registers_shape((64,))[-1:] == (1,)
    assert np.prod(rows.registers_shape((64,))) == 2


@pytest.mark.parametrize(
    ("group_size", "zero", "dtype"),
    [
        (32, True, "bfloat16"),
        (128, False, "bfloat16"),
        (64, False, "float16"),
        (None, True, "float16"),
    ],
)
def test_a_whole_weight(group_size, zero, dtype):
    """The instructions, the interpreter's stand-in and `weight.operands` agree to the bit."""
    w = interpreted.weight(128, 64, group_size, zero, dtype)
    fmt = dequant.Format(w.dtype, w.group_size, w.symmetric)

    @jax.jit
    def operands(w):
        slices = []
        for i in range(2):
            rows = [dequant.row_of(fmt, 64 * i + 64 * g // fmt.groups) for g in range(fmt.groups)]
            scales, offsets = (
                [] if a is None else [a[r] for r in rows] for a in (w.scale, w.offset)
            )
            slices.append(dequant.stand_in(fmt, w.fragments[0, i], scales, offsets).T)
        return weight.operands(w), jnp.concatenate(slices), layout.unpack(w.fragments)

    expected, stood_in, codes = (np.asarray(a) for a in operands(w))
    np.testing.assert_array_equal(stood_in, expected)
    inputs = w.k // w.scale.shape[0]
    scale, offset = (
        None if a is None else np.repeat(np.asarray(a, np.float64), inputs, axis=0)
        for a in (w.scale, w.offset)
    )
    for high in (False, True):
        got = converted(codes, scale, offset, w.dtype, w.symmetric, high)
        np.testing.assert_array_equal(got, expected.astype(np.float64))
