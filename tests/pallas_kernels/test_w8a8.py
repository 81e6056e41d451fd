"""The 8-bit product: its reference, the choice of tile sizes, and the kernels' schedules,
interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.pallas_kernels import reference, tuning8, w8a8
from jq.pallas_kernels.config import SHARED_MEMORY
from jq.pallas_kernels.config8 import Decode8Config, Prefill8Config
from tests.pallas_kernels import interpreted8, interpreting
from tests.pallas_kernels.interpreted8 import FP8, Case

# Norm over norm: the product is rounded once, from int32 or float32 sums of exact products.
TOLERANCE = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 1e-6}


@pytest.fixture(scope="module")
def interpretations():
    """Case's name -> error against float64, and whether a race was seen."""
    return interpreting.interpretations(interpreted8)


@pytest.mark.slow
@pytest.mark.parametrize("case", interpreted8.CASES, ids=lambda case: case.name)
def test_schedule(interpretations, case):
    result = interpretations[case.name]
    assert not result["races"]
    assert result["error"] < TOLERANCE[case.out_dtype]
    assert result["worst"] < 4 * TOLERANCE[case.out_dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", interpreted8.BROKEN)
def test_mistakes_would_be_seen(interpretations, name):
    """Without their fences, the kernels' copies race with the loads before them."""
    assert interpretations[name]["races"]


# The reference


def product(case, lead=()):
    """(y of the reference, the same in float64)."""
    x, x_scale, w, bias = interpreted8.problem(case)
    if lead:
        x, x_scale = x.reshape(*lead, -1), x_scale.reshape(*lead, -1)
    y = w8a8.w8a8_reference(x, x_scale, w, bias=bias, out_dtype=case.out_dtype)
    assert y.dtype == jnp.dtype(case.out_dtype)
    assert y.shape == (*(lead or (case.m,)), case.n)
    return np.asarray(y, np.float64).reshape(case.m, case.n), interpreted8.expected(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(Decode8Config(), 6, 192, 128),
        Case(Decode8Config(), 6, 192, 128, bias="bfloat16", out_dtype="float16"),
        Case(Decode8Config(), 6, 192, 128, out_dtype="float32", tensor=True),
        Case(Decode8Config(), 6, 192, 128, FP8, bias="float32"),
        Case(Decode8Config(), 6, 384, 256, FP8, block=True, out_dtype="float32"),
        Case(Decode8Config(), 6, 384, 256, FP8, block=True, bias="float16"),
    ],
    ids=lambda case: case.name,
)
def test_reference(case):
    y, exact = product(case, () if case.tensor else (2, 3))
    assert np.linalg.norm(y - exact) < TOLERANCE[case.out_dtype] * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["int8", FP8])
def test_the_reference_is_the_portable_layouts(dtype):
    """The same bits as from codes [K, N]: preparing a weight changes no result on a CPU."""
    x, x_scale, w, _ = interpreted8.problem(Case(Decode8Config(), 6, 192, 128, dtype))
    portable = (w.codes.T, w.scale[None, :])
    for out_dtype in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        y = w8a8.w8a8_reference(x, x_scale, w, out_dtype=out_dtype)
        expected = reference.scaled_matmul(x, x_scale, *portable, out_dtype)
        np.testing.assert_array_equal(y.astype(jnp.float32), expected.astype(jnp.float32))


def test_the_reference_of_blocks_is_the_portable_layouts():
    x, x_scale, w, _ = interpreted8.problem(Case(Decode8Config(), 6, 384, 256, FP8, block=True))
    y = w8a8.w8a8_reference(x, x_scale, w)
    blocks = x.reshape(6, 3, 128)
    portable = (w.codes.T, w.scale.T, jnp.dtype(jnp.bfloat16))
    expected = reference.block_scaled_matmul(blocks, x_scale[..., None], *portable)
    np.testing.assert_array_equal(y.astype(jnp.float32), expected.astype(jnp.float32))


# What is refused


def prepared(block=False):
    k, n = (256, 128) if block else (128, 64)
    dtype = FP8 if block else "int8"
    return interpreted8.problem(Case(Decode8Config(), 2, k, n, dtype, block))


@pytest.mark.parametrize("function", [w8a8.w8a8, w8a8.w8a8_reference])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": jnp.zeros((2, 64), jnp.int8)}, "does not multiply"),
        ({"x": jnp.zeros((2, 128), FP8)}, "quantize x to int8"),
        ({"x_scale": jnp.ones((2,))}, r"\[2, 1\] or \[\], not \(2,\)"),
        ({"bias": jnp.ones((1, 64))}, r"has to be \[64\]"),
        ({"out_dtype": jnp.int8}, "take one of bfloat16, float16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mismatches_are_refused(function, change, reason):
    x, x_scale, w, _ = prepared()
    arguments = {"x": x, "x_scale": x_scale, "bias": None, "out_dtype": jnp.bfloat16} | change
    x, x_scale = arguments.pop("x"), arguments.pop("x_scale")
    with pytest.raises(ValueError, match=reason):
        function(x, x_scale, w, **arguments)


def test_scales_of_rows_do_not_do_for_blocks():
    x, _, w, _ = prepared(block=True)
    with pytest.raises(ValueError, match=r"\[2, 2\], not \(2, 1\)"):
        w8a8.w8a8_reference(x, jnp.ones((2, 1)), w)


def test_no_rows():
    _, _, w, _ = prepared()
    y = w8a8.w8a8(jnp.zeros((3, 0, 128), jnp.int8), jnp.ones((3, 0, 1)), w, out_dtype=jnp.float16)
    assert (y.shape, y.dtype) == ((3, 0, 64), jnp.float16)


def test_supported():
    _, _, w, _ = prepared()
    assert w8a8.supported8(w, 1, (9, 0)) is None
    assert w8a8.supported8(w, 5000, "9.0") is None
    assert "not 7.0" in str(w8a8.supported8(w, 1, "7.0"))
    assert "no rows" in str(w8a8.supported8(w, 0, (9, 0)))
    stacked = jax.tree.map(lambda a: a[None], w)
    assert "stacked" in str(w8a8.supported8(stacked, 1, (9, 0)))


# Tile sizes


@pytest.mark.parametrize("dtype", ["int8", FP8])
def test_every_shape_gets_a_config(dtype):
    """Whatever the heuristic answers can be assembled, and is among what the tests assemble."""
    for m in (1, 7, 16, 33, 64, 65, 200, 257, 4096, 100_000):
        for k, n in ((64, 64), (4096, 1024), (4096, 14336), (28672, 8192)):
            config = tuning8.choose(m, k, n, dtype=dtype, block=None)
            assert config in tuning8.candidates(dtype)
            assert config.shared_bytes() < SHARED_MEMORY
    assert isinstance(tuning8.heuristic(1, 4096, 14336, dtype), Decode8Config)
    assert isinstance(tuning8.heuristic(4096, 4096, 14336, dtype), Prefill8Config)


def test_float8_sums_are_kept_twice():
    """So that no candidate has more columns than fit the registers, and none is run that has."""
    wide = Prefill8Config(2, 256, stages=2)
    assert wide.unsupported("int8") is None
    assert "kept twice" in str(wide.unsupported(FP8))
    assert all(config.unsupported(FP8) is None for config in tuning8.candidates(FP8)[-6:])
    x, x_scale, w, _ = interpreted8.problem(Case(wide, 2, 128, 64, FP8))
    with pytest.raises(ValueError, match="kept twice"):
        w8a8.w8a8(x, x_scale, w, config=wide)


def test_small_weights_are_cut_into_many_blocks():
    """32 blocks of 128 columns would leave 100 multiprocessors idle."""
    for k, n in ((4096, 4096), (8192, 1024)):
        config = tuning8.heuristic(1, k, n, "int8")
        assert isinstance(config, Decode8Config)
        assert n / config.block_n * config.split >= 64


def test_measurements_come_before_the_heuristic(monkeypatch):
    row = {"k": 4096, "n": 4096, "m": 16, "dtype": "int8", "block": None}
    row |= {"kernel": "decode8", "config": {"block_m": 16, "split": 8}}
    monkeypatch.setattr(tuning8, "TABLE", tuning8.table([row]))
    fmt = {"dtype": "int8", "block": None}
    assert tuning8.choose(9, 4096, 4096, **fmt) == Decode8Config(16, split=8)
    assert tuning8.choose(8, 4096, 4096, **fmt) == tuning8.heuristic(8, 4096, 4096, "int8")
    with pytest.raises(ValueError, match="two measurements"):
        tuning8.table([row, row])


def test_what_xla_was_faster_at_is_left_to_it(monkeypatch):
    _, _, w, _ = prepared()
    row = {"k": 128, "n": 64, "m": 16, "dtype": "int8", "block": None, "kernel": "reference"}
    monkeypatch.setattr(tuning8, "TABLE", tuning8.table([row]))
    assert "measured to be faster for 9 rows" in str(w8a8.supported8(w, 9, (9, 0)))
    assert w8a8.supported8(w, 8, (9, 0)) is None
    # Asked for by name, the kernel still has tile sizes.
    assert w8a8.choose8(9, w) in tuning8.candidates("int8")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Decode8Config(block_m=24),
        lambda: Decode8Config(split=3),
        lambda: Decode8Config(block_m=64, slices=4, stages=4),
        lambda: Prefill8Config(block_n=96),
        lambda: Prefill8Config(warpgroups=3, block_n=256),
        lambda: Prefill8Config(block_n=256, stages=5),
        lambda: Prefill8Config(multicast="y"),
    ],
)
def test_impossible_tile_sizes_are_refused(make):
    with pytest.raises(ValueError, match="Config"):
        make()
