"""Words of 32 bits, against Python integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq import packing
from jq.formats import words
from tests.oracles import packed_files as oracle


def random_codes(bits, shape):
    return np.random.default_rng([bits, *shape]).integers(0, 2**bits, shape).astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [32, 96, 40, 7])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_matches_integers_and_has_an_inverse(bits, size, axis):
    codes = random_codes(bits, (size, 3) if axis == 0 else (3, size))
    packed = words.pack(codes, bits, axis)
    np.testing.assert_array_equal(packed, oracle.pack(codes, bits, axis), strict=True)
    assert packed.shape[axis] == words.num_words(size, bits)
    np.testing.assert_array_equal(words.unpack(packed, bits, size, axis), codes, strict=True)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [64, 40, 9])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_words_are_the_bytes_of_the_own_packing(bits, size, axis):
    codes = random_codes(bits, (size, 5))
    stored = words.pack(codes if axis == 0 else np.ascontiguousarray(codes.T), bits, axis)
    packed = np.asarray(packing.pack(jnp.asarray(codes), bits))
    np.testing.assert_array_equal(words.to_bytes(stored, bits, size, axis), packed, strict=True)
    np.testing.assert_array_equal(words.from_bytes(packed, bits, size, axis), stored, strict=True)


def test_awq_deals_eight_columns_in_its_order():
    codes = random_codes(4, (3, 24))
    packed = words.pack_awq(codes)
    np.testing.assert_array_equal(packed, oracle.pack_awq(codes), strict=True)
    np.testing.assert_array_equal(words.unpack_awq(packed), codes, strict=True)
    one = words.pack_awq(np.arange(8, dtype=np.uint8)[None])
    assert one.view(np.uint32) == 0x75316420


@pytest.mark.parametrize("order", ["C", "F", ">", "strided"])
def test_any_layout_and_byte_order_gives_the_same(order):
    codes = random_codes(4, (32, 16))
    stored = words.pack(codes, 4, 0)
    if order == ">":
        other = stored.astype(">i4")
    elif order == "strided":
        other = np.repeat(stored, 2, axis=1)[:, ::2]
    else:
        other = np.array(stored, order=order)
    np.testing.assert_array_equal(words.unpack(other, 4, 32, 0), codes)
    want = words.to_bytes(stored, 4, 32, 0)
    np.testing.assert_array_equal(words.to_bytes(other, 4, 32, 0), want)
