"""The packed order: exactly inverted, where the formula says, and cut by cutting the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.pallas_kernels import layout


def random_codes(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 16, shape), jnp.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (3, 64, 128), (2, 2, 128, 64)])
def test_unpack_inverts_pack(shape):
    codes = random_codes(*shape)
    packed = jax.jit(layout.pack)(codes)
    *lead, k, n = shape
    assert packed.dtype == jnp.int32
    assert packed.shape == (*lead, n // 64, k // 64, 4, 128)
    np.testing.assert_array_equal(jax.jit(layout.unpack)(packed), codes)


def test_pack_inverts_unpack():
    """Every bit pattern is a fragment: the packing is one to one, and nothing is padding."""
    words = np.random.default_rng(1).integers(-(2**31), 2**31, (2, 1, 4, 128)).astype(np.int32)
    np.testing.assert_array_equal(layout.pack(layout.unpack(jnp.asarray(words))), words)


def test_every_code_is_where_the_formula_says():
    k, n = 128, 128
    codes = random_codes(k, n)
    words = np.asarray(layout.pack(codes)).view(np.uint32).reshape(2, 2, 4, 32, 4)
    codes = np.asarray(codes)
    for row in range(k):
        for column in range(n):
            step, kh, t, e = row % 64 // 16, row // 8 % 2, row // 2 % 4, row % 2
            warp, h, g = column % 64 // 16, column // 8 % 2, column % 8
            word = int(words[column // 64, row // 64, warp, 4 * g + t, step])
            assert word >> 4 * (4 * e + 2 * kh + h) & 15 == codes[row, column]


def test_shards_of_the_weight_are_shards_of_the_fragments():
    codes = random_codes(256, 256)
    whole = layout.pack(codes)
    np.testing.assert_array_equal(layout.pack(codes[:, 64:192]), whole[1:3])
    np.testing.assert_array_equal(layout.pack(codes[64:192]), whole[:, 1:3])


def test_stacked_layers_pack_alone():
    codes = random_codes(3, 64, 128)
    np.testing.assert_array_equal(jax.vmap(layout.pack)(codes), layout.pack(codes))
    np.testing.assert_array_equal(layout.pack(codes)[1], layout.pack(codes[1]))


@pytest.mark.parametrize("shape", [(96, 64), (64, 100)])
def test_sizes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 64"):
        layout.pack(jnp.zeros(shape, jnp.uint8))
