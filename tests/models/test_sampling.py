"""Sampling: which tokens may be drawn, exactly, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.errors import ModelError
from jq.models import sampling as module
from jq.models.sampling import Sampling, candidates

sample = jax.jit(module.sample, static_argnums=2)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (3, 50)).astype(np.float32)


def allowed(row, sampling):
    """Token ids that may be drawn, by the definitions, in float64."""
    scaled = row.astype(np.float64) / sampling.temperature
    order = sorted(range(len(row)), key=lambda token: (-scaled[token], token))
    order = order[: sampling.top_k]
    p = np.exp(scaled[order] - scaled.max())
    p /= p.sum()
    if sampling.top_p is None:
        return set(order)
    count = next((n for n in range(1, len(p) + 1) if p[:n].sum() >= sampling.top_p), len(p))
    return set(order[:count])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 80])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
def test_the_allowed_tokens_are_exact(temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    ids, scaled, inside = candidates(jnp.asarray(LOGITS), sampling)
    for row in range(len(LOGITS)):
        got = set(np.asarray(ids)[row][np.asarray(inside)[row]].tolist())
        if top_p == 1.0:  # the last tokens lie within rounding of 1
            assert allowed(LOGITS[row], Sampling(temperature, top_k, 0.9999)) <= got
        else:
            assert got == allowed(LOGITS[row], sampling)
        want = LOGITS[row][np.asarray(ids)[row]] / temperature
        np.testing.assert_allclose(np.asarray(scaled)[row], want, rtol=1e-6)


def test_ties_go_to_the_lower_token():
    logits = jnp.asarray([[0.0, 2.0, 2.0, 2.0]])
    ids, _, _ = candidates(logits, Sampling(1.0, top_k=2))
    assert ids.tolist() == [[1, 2]]


def test_draws_follow_the_distribution():
    count, sampling = 20_000, Sampling(0.7, top_k=6, top_p=0.95)
    logits = np.broadcast_to(LOGITS[:1], (count, 50))
    drawn = np.asarray(sample(jnp.asarray(logits), jax.random.key(3), sampling))
    tokens = sorted(allowed(LOGITS[0], sampling))
    p = np.exp(LOGITS[0][tokens].astype(np.float64) / 0.7)
    p /= p.sum()
    seen = np.array([(drawn == token).sum() for token in tokens])
    assert seen.sum() == count
    chi2 = np.sum((seen - count * p) ** 2 / (count * p))
    assert chi2 < 30  # at most 5 degrees of freedom: p < 2e-5
    assert len(tokens) > 2


def test_greedy_and_top_1_take_the_most_likely():
    best = LOGITS.argmax(-1)
    assert sample(jnp.asarray(LOGITS), None, Sampling()).tolist() == best.tolist()
    one = sample(jnp.asarray(LOGITS), jax.random.key(0), Sampling(5.0, top_k=1))
    assert one.tolist() == best.tolist()


def test_a_row_draws_the_same_in_any_batch():
    sampling, key = Sampling(1.5), jax.random.key(7)
    many = sample(jnp.asarray(LOGITS), key, sampling)
    few = sample(jnp.asarray(LOGITS[:1]), key, sampling)
    assert int(many[0]) == int(few[0])
    flat = jnp.zeros((64, 50))
    assert len(set(sample(flat, key, sampling).tolist())) > 20
    other = sample(flat, jax.random.key(8), sampling)
    assert (other != sample(flat, key, sampling)).any()


def test_rows_that_are_not_finite_are_marked():
    logits = LOGITS.copy()
    logits[1, 4] = np.nan
    logits[2, 9] = np.inf
    for sampling in (Sampling(), Sampling(1.0, top_k=5)):
        tokens = sample(jnp.asarray(logits), jax.random.key(0), sampling).tolist()
        assert tokens[0] >= 0
        assert tokens[1:] == [-1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        Sampling(**options)


def test_a_temperature_needs_a_key():
    with pytest.raises(ModelError, match="needs a key"):
        sample(jnp.asarray(LOGITS), None, Sampling(1.0))
