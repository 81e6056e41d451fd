"""The int4 product: preparation, choice of tile sizes, and the kernels' schedules, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.pallas_kernels import tuning, w4a16, weight
from jq.pallas_kernels.config import SHARED_MEMORY, DecodeConfig, PrefillConfig
from tests.pallas_kernels import interpreted, interpreting

# Norm over norm: the product is rounded once, from float32 sums of exact operands.
TOLERANCE = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


@pytest.fixture(scope="module")
def interpretations():
    """Case's name -> error against float64, and whether a race was seen."""
    return interpreting.interpretations(interpreted)


@pytest.mark.slow
@pytest.mark.parametrize("case", interpreted.CASES, ids=lambda case: case.name)
def test_schedule(interpretations, case):
    result = interpretations[case.name]
    assert not result["races"]
    assert result["error"] < TOLERANCE[case.dtype]
    assert result["worst"] < 4 * TOLERANCE[case.dtype]


@pytest.mark.slow
def test_mistakes_would_be_seen(interpretations):
    """Without its fences, the decode kernel's copies race with the loads before them."""
    assert interpretations["broken"]["races"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero"])
def test_preparation(dtype, zero):
    """(code - zero) * scale, rounded once to the dtype, times a power of two; any column."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (2, 128, 64))
    zeros = rng.integers(0, 16, (2, 4, 64)) if zero else np.full((2, 4, 64), 8)
    # Columns from 1e-30 to 1e30: each has its own power of two.
    scale = rng.uniform(0.5, 1.5, (2, 4, 64)) * 10.0 ** rng.integers(-30, 31, (2, 1, 64))
    scale = np.asarray(scale, np.float32)
    w = jax.jit(functools.partial(weight.w4_weight, dtype=dtype))(
        jnp.asarray(codes, jnp.uint8),
        jnp.asarray(scale),
        jnp.asarray(zeros, jnp.uint8) if zero else None,
    )
    assert (w.shape, w.group_size, w.symmetric, w.dtype) == ((2, 128, 64), 32, not zero, dtype)
    got = np.asarray(jax.jit(weight.dequantize)(w), np.float64)
    assert np.all(np.isfinite(got))
    power = 2.0 ** np.floor(np.log2(scale.max(-2, keepdims=True)))
    rounded = np.asarray((scale / power).astype(np.float32).astype(jnp.dtype(dtype)), np.float64)
    exact = (codes - np.repeat(zeros, 32, 1)) * np.repeat(rounded * power, 32, 1)
    ulp = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    assert np.all(np.abs(got - exact) <= ulp * np.abs(exact))


def test_scales_per_column_are_not_rounded():
    rng = np.random.default_rng(4)
    codes, scale = rng.integers(0, 16, (64, 64)), rng.uniform(0.001, 0.1, (1, 64))
    scale = scale.astype(np.float32)
    make = jax.jit(weight.w4_weight)
    w = make(jnp.asarray(codes, jnp.uint8), jnp.asarray(scale))
    assert w.group_size is None
    got = np.asarray(jax.jit(weight.dequantize)(w), np.float64)
    np.testing.assert_allclose(got, (codes - 8) * scale.astype(np.float64), rtol=3e-7)


def test_columns_of_zeros():
    codes = jnp.full((64, 64), 3, jnp.uint8)
    w = jax.jit(weight.w4_weight)(codes, jnp.zeros((2, 64), jnp.float32))
    np.testing.assert_array_equal(jax.jit(weight.dequantize)(w), 0)


@pytest.mark.parametrize(
    ("k", "n", "groups", "reason"),
    [
        (96, 64, 3, "K = 96 is no multiple of 64"),
        (64, 80, 2, "N = 80 is no multiple of 64"),
        (128, 64, 8, "group size 16"),
        (128, 64, 3, "do not divide"),
    ],
)
def test_weights_that_do_not_fit_are_refused(k, n, groups, reason):
    with pytest.raises(ValueError, match=reason):
        weight.w4_weight(jnp.zeros((k, n), jnp.uint8), jnp.ones((groups, n), jnp.float32))


@functools.cache
def prepared():
    return interpreted.weight(128, 64, 64, False, "bfloat16")


@pytest.mark.parametrize("function", [w4a16.w4a16, w4a16.w4a16_reference])
def test_mismatches_are_refused(function):
    with pytest.raises(ValueError, match="does not multiply"):
        function(jnp.zeros((2, 64), jnp.bfloat16), prepared())
    with pytest.raises(ValueError, match="prepared for bfloat16"):
        function(jnp.zeros((2, 128), jnp.float16), prepared())


def test_no_rows():
    assert w4a16.w4a16(jnp.zeros((3, 0, 128), jnp.bfloat16), prepared()).shape == (3, 0, 64)


def test_reference():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 128)), jnp.bfloat16)
    y = np.asarray(w4a16.w4a16_reference(x, prepared()), np.float64)
    expected = np.asarray(x, np.float64) @ np.asarray(weight.dequantize(prepared()), np.float64)
    assert y.shape == (2, 3, 64)
    assert np.linalg.norm(y - expected) < TOLERANCE["bfloat16"] * np.linalg.norm(expected)


def test_supported():
    w = prepared()
    assert w4a16.supported(w, 1, (9, 0)) is None
    assert w4a16.supported(w, 5000, "9.0") is None
    assert all(w4a16.supported(w, 1, one) is None for one in ("8.0", (8, 6), "8.9"))
    assert "9.0 (Hopper), not 7.5" in str(w4a16.supported(w, 1, "7.5"))
    assert "not 10.0" in str(w4a16.supported(w, 1, (10, 0)))
    assert "no rows" in str(w4a16.supported(w, 0, (9, 0)))
    stacked = jax.tree.map(lambda a: a[None], w)
    assert "stacked" in str(w4a16.supported(stacked, 1, (9, 0)))


def test_every_shape_gets_a_config():
    """Whatever the heuristic answers can be assembled, and is among what the tests assemble."""
    for m in (1, 7, 16, 33, 64, 65, 200, 257, 4096, 100_000):
        for k, n in ((64, 64), (4096, 1024), (4096, 14336), (28672, 8192)):
            config = tuning.choose(m, k, n, dtype="bfloat16", group_size=128, symmetric=True)
            assert config in tuning.CANDIDATES
            assert config.shared_bytes() < SHARED_MEMORY
    assert isinstance(tuning.heuristic(1, 4096, 14336), DecodeConfig)
    assert isinstance(tuning.heuristic(4096, 4096, 14336), PrefillConfig)


def test_small_weights_are_split():
    """32 blocks would leave 100 multiprocessors idle."""
    config = tuning.heuristic(1, 4096, 4096)
    assert isinstance(config, DecodeConfig)
    assert config.split > 1


def test_measurements_come_before_the_heuristic(monkeypatch):
    row = {"k": 4096, "n": 4096, "m": 16, "dtype": "bfloat16", "group_size": None}
    row |= {"symmetric": True, "kernel": "decode", "config": {"block_m": 16, "split": 8}}
    monkeypatch.setattr(tuning, "TABLE", tuning.table([row]))
    fmt = {"dtype": "bfloat16", "group_size": None, "symmetric": True}
    assert tuning.choose(9, 4096, 4096, **fmt) == DecodeConfig(16, split=8)
    assert tuning.choose(8, 4096, 4096, **fmt) == tuning.heuristic(8, 4096, 4096, True)
    with pytest.raises(ValueError, match="two measurements"):
        tuning.table([row, row])


def test_what_xla_was_faster_at_is_left_to_it(monkeypatch):
    w = jax.eval_shape(
        lambda: weight.w4_weight(
            jnp.zeros((128, 64), jnp.uint8), jnp.ones((1, 64)), None, dtype="bfloat16"
        )
    )
    row = {"k": 128, "n": 64, "m": 16, "dtype": "bfloat16", "group_size": w.group_size}
    row |= {"symmetric": True, "kernel": "reference"}
    assert w4a16.supported(w, 9, (9, 0)) is None
    monkeypatch.setattr(tuning, "TABLE", tuning.table([row]))
    assert "measured to be faster for 9 rows" in w4a16.supported(w, 9, (9, 0))
    assert w4a16.supported(w, 8, (9, 0)) is None
    # Asked for by name, the kernel still has tile sizes.
    fmt = {"dtype": "bfloat16", "group_size": w.group_size, "symmetric": True}
    assert tuning.choose(9, 128, 64, **fmt) in tuning.CANDIDATES


@pytest.mark.parametrize("m", [1, 8, 9, 4096, 4097])
def test_buckets(m):
    found = tuning.bucket(m)
    assert found == 0 or (found >= m and found in tuning.BUCKETS)
    assert (found == 0) == (m > 4096)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DecodeConfig(block_m=24),
        lambda: DecodeConfig(split=3),
        lambda: DecodeConfig(warpgroups=3, tiles=2),
        lambda: DecodeConfig(block_m=64, stages=16),
        lambda: PrefillConfig(stages=3),
        lambda: PrefillConfig(block_m=256, stages=6),
    ],
)
def test_impossible_tile_sizes_are_refused(make):
    with pytest.raises(ValueError, match="Config"):
        make()
