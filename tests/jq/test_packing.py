"""Packing against bit streams made of Python integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import packing
from tests.oracles import packing as oracle

BITS = range(2, 9)
pack = jax.jit(packing.pack, static_argnums=(1, 2))
unpack = jax.jit(packing.unpack, static_argnums=(1, 2, 3))


@functools.cache
def random_codes(bits: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(bits * 100 + sum(shape))
    return rng.integers(0, 2**bits, shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("shape", [(1, 1), (8, 16), (13, 9), (2, 3, 11, 5)], ids=str)
def test_bytes_are_the_bit_streams(bits, axis, shape):
    codes = random_codes(bits, shape)
    packed = pack(codes, bits, axis)
    assert packed.dtype == jnp.uint8
    assert packed.shape[axis] == packing.packed_size(shape[axis], bits)
    np.testing.assert_array_equal(packed, oracle.pack(codes, bits, axis))
    back = unpack(packed, bits, shape[axis], axis)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(oracle.unpack(np.asarray(packed), bits, shape[axis], axis), codes)


@pytest.mark.parametrize("bits", BITS)
def test_storage_is_dense(bits):
    """Three bits cost three bits, not four."""
    assert packing.packed_size(4096, bits) * 8 == 4096 * bits
    assert packing.packed_size(1, bits) == (1 if bits == 8 else bits)
    assert packing.packed_size(0, bits) == 0


def test_every_byte_of_every_lane():
    """All codes in all eight lanes, 3 bits: no lane leaks into its neighbours."""
    codes = np.zeros((64, 1), np.uint8)
    for lane in range(8):
        for code in range(8):
            codes[:] = 0
            codes[lane * 8 + lane] = code
            packed = np.asarray(pack(codes, 3, -2))
            np.testing.assert_array_equal(packed, oracle.pack(codes, 3, -2))


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x21, 0x43, 0x65, 0x87]),
        (2, [3, 2, 1, 0, 0, 0, 0, 1], [0b00011011, 0b01000000]),
        (3, [7, 0, 7, 0, 0, 0, 0, 0], [0b11000111, 0b00000001, 0]),
        (8, [1, 255], [1, 255]),
    ],
)
def test_the_layout_is_this_one(bits, codes, packed):
    """Checkpoints hold these bytes: a change needs another LAYOUT_VERSION."""
    assert packing.LAYOUT_VERSION == 1
    column = jnp.asarray(codes, jnp.uint8)[:, None]
    assert np.asarray(packing.pack(column, bits))[:, 0].tolist() == packed
    assert oracle.pack_vector(codes, bits) == packed


def test_packing_maps_over_leading_axes():
    codes = random_codes(3, (4, 24, 5))
    np.testing.assert_array_equal(jax.vmap(lambda c: packing.pack(c, 3))(codes), pack(codes, 3, -2))
