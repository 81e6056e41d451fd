"""Round to nearest, and the clip searches, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq.methods import clip
from jq.methods.rtn import RTN, rtn_quantize
from jq.spec import FP8, QuantSpec
from tests.jq import problems
from tests.oracles import clip as clip_oracle
from tests.oracles import formats, rtn


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [16, 48, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_codes(bits, group_size, symmetric):
    spec = QuantSpec(f"int{bits}", group_size, symmetric)
    w = problems.weights(96, 10, bits)
    solution = rtn_quantize(w, spec)
    expected = rtn.quantize(w, formats.format_of(spec), group_size)
    problems.count_ties(solution.codes, expected.codes, expected.margins)
    np.testing.assert_array_equal(solution.scale, expected.scale)
    np.testing.assert_array_equal(solution.zero, expected.zero)
    back = rtn.dequantize(expected, formats.format_of(spec))
    assert problems.relative_error(solution.dequantize(spec), back) < 1e-6


@pytest.mark.parametrize(("granularity", "shared"), [("group", 1), ("tensor", 32), ("block", 16)])
def test_float8_codes(granularity, shared):
    spec = QuantSpec(FP8, 16, granularity=granularity)
    w = problems.weights(48, 32, 7)
    solution = rtn_quantize(w, spec)
    expected = rtn.quantize(w, formats.format_of(spec), spec.group_size, shared=shared)
    problems.count_ties(solution.codes, expected.codes, expected.margins)
    np.testing.assert_array_equal(solution.scale, expected.scale)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_rounded_in_float32(dtype):
    w = jnp.asarray(problems.weights(32, 8), dtype)
    spec = QuantSpec("int4", 16)
    wide = rtn_quantize(w.astype(jnp.float32), spec)
    np.testing.assert_array_equal(rtn_quantize(w, spec).codes, wide.codes)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", ["mse", "output"])
@pytest.mark.parametrize("bits", [2, 4])
def test_clip_searches(kind, symmetric, bits):
    spec = QuantSpec(f"int{bits}", 16, symmetric)
    w, gram = problems.weights(48, 8, bits), problems.gram(48)
    solution = rtn_quantize(w, spec, kind, gram)
    expected = rtn.quantize(w, formats.format_of(spec), 16, clip=kind, gram=gram)
    np.testing.assert_array_equal(solution.scale, expected.scale)
    np.testing.assert_array_equal(solution.zero, expected.zero)
    problems.count_ties(solution.codes, expected.codes, expected.margins)
    whole = rtn.quantize(w, formats.format_of(spec), 16)
    assert np.mean(expected.scale < 0.97 * whole.scale) > 0.1  # the search found something


@pytest.mark.parametrize("kind", ["mse", "output"])
def test_clip_searches_over_shared_scales(kind):
    spec = QuantSpec("int3", granularity="tensor")
    w, gram = problems.weights(24, 6), problems.gram(24)
    solution = rtn_quantize(w, spec, kind, gram)
    expected = rtn.quantize(w, formats.format_of(spec), -1, shared=6, clip=kind, gram=gram)
    np.testing.assert_array_equal(solution.scale, expected.scale)


def test_importance_weighs_the_squared_error():
    spec = QuantSpec("int3", 16)
    w = problems.weights(16, 6, 9)
    importance = np.random.default_rng(0).lognormal(0, 2, 16).astype(np.float32)
    largest = np.abs(w).max(0)
    lo, hi = (jnp.asarray(a[None, None]) for a in (-largest, largest))
    loss = clip.squared_error(jnp.asarray(importance[None, :, None]))
    _, found = clip.search_range(jnp.asarray(w[None]), lo, hi, spec, loss)
    for column in range(6):
        losses = clip_oracle.losses(
            w[:, column : column + 1].astype(np.float64),
            -largest[column],
            largest[column],
            formats.format_of(spec),
            lambda error: float((importance[:, None] * error**2).sum()),
        )
        factor = clip_oracle.FACTORS[int(np.argmin(losses))]
        assert found[0, 0, column] == pytest.approx(factor * largest[column], rel=1e-6)


def test_groups_gram_blocks_are_the_diagonals():
    gram = np.arange(36, dtype=np.float32).reshape(6, 6)
    blocks = np.asarray(clip.gram_blocks(jnp.asarray(gram), 3))
    for g in range(3):
        np.testing.assert_array_equal(blocks[g], gram[2 * g : 2 * g + 2, 2 * g : 2 * g + 2])


def test_broken_statistics_leave_the_range_alone():
    spec, w = QuantSpec("int4", 16), problems.weights(32, 4)
    broken = rtn_quantize(w, spec, "output", jnp.full((32, 32), jnp.nan))
    np.testing.assert_array_equal(broken.scale, rtn_quantize(w, spec).scale)


def test_only_the_output_search_needs_statistics():
    assert [RTN(clip=kind).needs_statistics for kind in ("none", "mse", "output")] == [0, 0, 1]
