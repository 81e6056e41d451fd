"""Folding scales: the function stays what it was."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq import folding
from jq.blockwise import LinearGroup
from jq.errors import SpecError
from tests.jq import cases, problems

D, HEADS, SHARE, HEAD_DIM = 16, 4, 2, 4


def block(dtype="float32", bias=True, seed=0) -> dict:
    rng = np.random.default_rng(seed)

    def kernel(k, n):
        return {"kernel": jnp.asarray(rng.standard_normal((k, n)), dtype)}

    v = kernel(D, HEADS // SHARE * HEAD_DIM)
    if bias:
        v["bias"] = jnp.asarray(rng.standard_normal(HEADS // SHARE * HEAD_DIM), dtype)
    return {
        "norm": {"scale": jnp.asarray(rng.uniform(0.5, 2, D), dtype)},
        "attention": {"q_proj": kernel(D, 8), "v_proj": v, "o_proj": kernel(HEADS * HEAD_DIM, D)},
    }


NORM = LinearGroup("qv", ("attention/q_proj", "attention/v_proj"), "norm")
VALUES = LinearGroup("o", ("attention/o_proj",), "attention/v_proj", "linear", SHARE, HEAD_DIM)
ALONE = LinearGroup("o", ("attention/o_proj",), "attention/v_proj", "linear")


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def from_norm(params, x):
    """What both linears after the norm give, in float64."""
    normed = x * f64(params["norm"]["scale"])
    return np.hstack([normed @ f64(params["attention"][p]["kernel"]) for p in ("q_proj", "v_proj")])


def through_values(params, x):
    """Attention's second half: values, repeated for the query heads, mixed over tokens, o."""
    v = x @ f64(params["attention"]["v_proj"]["kernel"])
    v = v + f64(params["attention"]["v_proj"].get("bias", 0))
    heads = np.repeat(v.reshape(len(x), HEADS // SHARE, HEAD_DIM), SHARE, axis=1)
    mixing = np.random.default_rng(5).dirichlet(np.ones(len(x)), (HEADS, len(x)))
    mixed = np.einsum("hts,shd->thd", mixing, heads)
    return mixed.reshape(len(x), -1) @ f64(params["attention"]["o_proj"]["kernel"])


def random_scale(k, seed=1):
    return jnp.asarray(np.random.default_rng(seed).lognormal(0, 1.5, k), jnp.float32)


def test_into_a_norm():
    params, x = block(), np.random.default_rng(2).standard_normal((6, D))
    folded, used = folding.fold(params, NORM, random_scale(D))
    assert problems.relative_error(used, random_scale(D)) < 1e-6
    assert problems.relative_error(from_norm(folded, x), from_norm(params, x)) < 1e-6
    assert problems.relative_error(folded["norm"]["scale"], params["norm"]["scale"]) > 0.1


def test_into_a_norm_of_few_bits_loses_nothing():
    """The scale moves to where the norm's weight can take its inverse exactly."""
    params = block("float32")
    params["norm"]["scale"] = params["norm"]["scale"].astype(jnp.bfloat16)
    x = np.random.default_rng(2).standard_normal((6, D))
    folded, used = folding.fold(params, NORM, random_scale(D))
    assert folded["norm"]["scale"].dtype == jnp.bfloat16
    back = f64(folded["norm"]["scale"]) * f64(used)
    np.testing.assert_allclose(back, f64(params["norm"]["scale"]), rtol=1e-7)
    np.testing.assert_allclose(used, random_scale(D), rtol=2**-8)
    assert problems.relative_error(from_norm(folded, x), from_norm(params, x)) < 1e-6


def test_a_norm_that_is_off_stays_off():
    params = block()
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(0.0)
    folded, used = folding.fold(params, NORM, random_scale(D))
    assert folded["norm"]["scale"][3] == 0
    assert used[3] == random_scale(D)[3]


@pytest.mark.parametrize("bias", [True, False])
def test_into_a_linear_shared_by_query_heads(bias):
    params, x = block(bias=bias), np.random.default_rng(3).standard_normal((6, D))
    scale = folding.shared_mean(random_scale(HEADS * HEAD_DIM), VALUES)
    folded, used = folding.fold(params, VALUES, scale)
    np.testing.assert_array_equal(used, scale)
    assert problems.relative_error(through_values(folded, x), through_values(params, x)) < 1e-6
    changed = folded["attention"]["v_proj"]["kernel"]
    assert problems.relative_error(changed, params["attention"]["v_proj"]["kernel"]) > 0.1
    assert folded["attention"]["q_proj"] is params["attention"]["q_proj"]


def test_scales_of_shared_heads_agree():
    x = random_scale(HEADS * HEAD_DIM)
    heads = f64(x).reshape(HEADS // SHARE, SHARE, HEAD_DIM)
    for shared, reduced in (
        (folding.shared_mean, heads.mean(1)),
        (folding.shared_max, heads.max(1)),
    ):
        expected = np.repeat(reduced, SHARE, axis=0).reshape(-1)
        np.testing.assert_allclose(shared(x, VALUES), expected, rtol=1e-6)
        np.testing.assert_array_equal(shared(x, ALONE), x)


def test_an_unequal_scale_would_be_noticed():
    """The check above fails for a scale that query heads do not share."""
    params, x = block(), np.random.default_rng(3).standard_normal((6, D))
    folded, _ = folding.fold(params, VALUES, random_scale(HEADS * HEAD_DIM))
    assert problems.relative_error(through_values(folded, x), through_values(params, x)) > 1e-2


def test_dtypes_are_kept_and_nothing_is_changed_in_place():
    params = block("bfloat16")
    before = f64(params["norm"]["scale"]).copy()
    folded, used = folding.fold(params, NORM, random_scale(D))
    assert used.dtype == jnp.float32
    assert folded["attention"]["q_proj"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(f64(params["norm"]["scale"]), before)


def test_what_cannot_be_folded():
    with pytest.raises(SpecError, match="'o' has no producer"):
        folding.fold(block(), LinearGroup("o", ("attention/o_proj",)), random_scale(16))
    params = block()
    params["attention"]["q_proj"]["kernel"] = cases.weight("int4 channel")
    with pytest.raises(SpecError, match="attention/q_proj/kernel: already quantized"):
        folding.fold(params, NORM, random_scale(D))
