"""The kernels' 8-bit weights: the order of the codes and scales, and what they do not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.pallas_kernels import weight8

FP8 = "float8_e4m3fn"
SCALES = {"tensor": (1, 1), "column": (1, 384), "block": (2, 3)}


def portable(dtype, scales, lead=()):
    """(codes [..., 256, 384], scale) with values that differ everywhere."""
    rng = np.random.default_rng(2)
    codes = rng.integers(-120, 121, (*lead, 256, 384))
    scale = rng.uniform(0.5, 1.5, (*lead, *scales))
    return jnp.asarray(codes, jnp.float32).astype(dtype), jnp.asarray(scale, jnp.float32)


@pytest.mark.parametrize("lead", [(), (2,)], ids=["one", "stacked"])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("int8", "tensor"), ("int8", "column"), (FP8, "tensor"), (FP8, "column"), (FP8, "block")],
)
def test_codes_times_scales(dtype, kind, lead):
    codes, scale = portable(dtype, SCALES[kind], lead)
    w = jax.jit(weight8.w8_weight)(codes, scale)
    assert (w.shape, w.ndim, w.k, w.n) == ((*lead, 256, 384), 2 + len(lead), 256, 384)
    assert (w.dtype, w.block) == (jnp.dtype(dtype), 128 if kind == "block" else None)
    assert w.codes.shape == (*lead, 384, 256)
    assert w.scale.shape == (*lead, *((3, 2) if kind == "block" else (384,)))
    assert w.nbytes == codes.size + 4 * w.scale.size
    repeats = (256 // scale.shape[-2], 384 // scale.shape[-1])
    wide = np.asarray(scale).repeat(repeats[0], -2).repeat(repeats[1], -1)
    expected = np.asarray(codes, np.float32) * wide
    np.testing.assert_array_equal(weight8.dequantize(w), expected)


def test_vmap_stacks():
    codes, scale = portable(FP8, SCALES["block"], (2,))
    one, all_ = jax.vmap(weight8.w8_weight)(codes, scale), weight8.w8_weight(codes, scale)
    assert one.block == all_.block == 128
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(all_), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


def test_shards_are_weights():
    codes, scale = portable(FP8, SCALES["block"])
    w = weight8.w8_weight(codes, scale)
    shard = weight8.W8Weight(w.codes[128:, :128], w.scale[1:, :1], w.block)
    assert shard.shape == (128, 256)
    np.testing.assert_array_equal(weight8.dequantize(shard), weight8.dequantize(w)[:128, 128:])


@pytest.mark.parametrize(
    ("dtype", "k", "n", "scale", "reason"),
    [
        ("int8", 96, 64, (1, 64), "K = 96 is no multiple of 64"),
        ("int8", 64, 80, (1, 80), "N = 80 is no multiple of 64"),
        ("int8", 128, 256, (1, 2), "int8 weights have a scale per column"),
        (FP8, 192, 128, (2, 1), "K = 192 is no multiple of 128"),
        (FP8, 256, 128, (4, 1), "neither per column"),
        ("uint8", 64, 64, (1, 64), "codes are uint8"),
        ("float8_e5m2", 64, 64, (1, 64), "codes are float8_e5m2"),
    ],
)
def test_weights_that_do_not_fit_are_refused(dtype, k, n, scale, reason):
    with pytest.raises(ValueError, match=reason):
        weight8.w8_weight(jnp.zeros((k, n), dtype), jnp.ones(scale, jnp.float32))


def test_blocks_of_other_sizes_are_refused():
    assert "64 x 64" in str(weight8.unsupported_format8(256, 256, FP8, 64))
    assert weight8.unsupported_format8(256, 256, FP8, 128) is None
