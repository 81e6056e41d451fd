"""Scores of single tokens against float64, and how they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.errors import CalibrationError
from jq.evaluate import forward, scores
from jq.evaluate.scores import kl_divergence, log_likelihood, same_first_choice, token_log_probs
from tests.jq.evaluate.tiny import VOCAB, Tiny, compiled_programs, make_params, numpy_logits
from tests.oracles import evaluation as oracle

TINY = Tiny()


def kl(p, q):
    return np.asarray(jax.jit(kl_divergence)(p, q))


def logits_pair(noise, shape=(5, 200), seed=0):
    rng = np.random.default_rng(seed)
    p = (3 * rng.normal(size=shape)).astype(np.float32)
    return p, (p + noise * rng.normal(size=shape)).astype(np.float32)


def oracle_kl(p, q):
    tokens = [0] * (len(p) + 1)
    return oracle.window_scores(tokens, [*q, q[0]], [*p, p[0]])[1]


@pytest.mark.parametrize("noise", [10.0, 1.0, 0.1, 1e-2, 1e-3])
def test_kl_keeps_its_digits(noise):
    p, q = logits_pair(noise)
    want = oracle_kl(p, q)  # from 10 down to 5e-7 nats
    np.testing.assert_allclose(kl(p, q), want, rtol=2e-3 if noise < 0.1 else 1e-5)


def test_kl_of_equals_is_zero_and_shifts_do_not_matter():
    p, _ = logits_pair(0.0)
    assert (kl(p, p) == 0).all()
    assert np.abs(kl(p, p + 4.0)).max() < 1e-12


def test_kl_of_impossible_tokens():
    p, q = logits_pair(1.0)
    for x in (p, q):
        x[:, 7] = -np.inf  # a vocabulary entry that both rule out, as some models' padding
    keep = np.arange(200) != 7
    np.testing.assert_allclose(kl(p, q), oracle_kl(p[:, keep], q[:, keep]), rtol=1e-5)
    q[:, 8] = -np.inf  # the model rules out what the reference does not
    assert np.isinf(kl(p, q)).all()


def test_kl_far_apart_is_finite():
    p, q = np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32)
    p[0, 0], q[0, 1] = 300.0, 300.0
    np.testing.assert_allclose(kl(p, q), [300.0], rtol=1e-6)


def test_log_likelihood():
    p, _ = logits_pair(0.0)
    targets = np.array([3, 199, 0, 7, 7], np.int32)
    want = [oracle.log_softmax(row)[t] for row, t in zip(p, targets, strict=True)]
    np.testing.assert_allclose(
        log_likelihood(jnp.asarray(p), jnp.asarray(targets)), want, rtol=1e-6
    )


def test_same_first_choice():
    p = np.array([[0, 2, 1], [5, 1, 5], [1, 2, 3]], np.float32)
    q = np.array([[0, 9, 8], [7, 1, 7], [3, 2, 1]], np.float32)
    assert same_first_choice(jnp.asarray(p), jnp.asarray(q)).tolist() == [True, True, False]


def tokens_of(shape, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def test_token_log_probs():
    params, tokens = make_params(), tokens_of((3, 17))
    got = token_log_probs(TINY, params, jnp.asarray(tokens))
    assert got.shape == (3, 16)
    assert got.dtype == jnp.float32
    for row, want in zip(got, tokens, strict=True):
        nll, *_ = oracle.window_scores(want, numpy_logits(TINY, params, want))
        np.testing.assert_allclose(-row, nll, rtol=1e-5, atol=1e-5)


def test_probabilities_sum_to_one():
    """Over all continuations of a prefix."""
    prefix = np.tile(tokens_of((1, 6)), (VOCAB, 1))
    tokens = np.concatenate([prefix, np.arange(VOCAB, dtype=np.int32)[:, None]], axis=1)
    last = np.asarray(token_log_probs(TINY, make_params(), jnp.asarray(tokens)))[:, -1]
    assert np.exp(last.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)


def test_one_token_leaves_nothing_to_predict():
    with pytest.raises(CalibrationError, match=r"\(3, 1\) leave nothing to predict"):
        token_log_probs(TINY, make_params(), jnp.zeros((3, 1), jnp.int32))


@pytest.mark.parametrize("stretch", [1, 3, 5, 16, 40])
def test_stretches_do_not_change_scores(stretch, monkeypatch):
    params, tokens = make_params(), jnp.asarray(tokens_of((2, 17)))
    whole = token_log_probs(TINY, params, tokens)
    monkeypatch.setattr(scores, "_MAX_LOGITS", stretch * 2 * VOCAB)
    np.testing.assert_allclose(token_log_probs(TINY, params, tokens), whole, rtol=1e-5)


def largest_array(jaxpr):
    """Elements of the largest array a program makes, nested ones included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars]
        inner = [x.jaxpr for x in equation.params.values() if hasattr(x, "jaxpr")]
        sizes += [largest_array(x) for x in inner]
    return max(sizes)


def test_logits_are_never_whole(monkeypatch):
    params = make_params()
    h = jnp.zeros((2, 129, 8))
    tokens = jnp.zeros((2, 129), jnp.int32)
    outer = forward.outer_params(TINY, params)
    sizes = {}
    for limit in (2 * 16 * VOCAB, 2**25):
        monkeypatch.setattr(scores, "_MAX_LOGITS", limit)
        stretch = scores._stretch(tokens.shape, VOCAB)
        program = jax.make_jaxpr(
            lambda h, stretch=stretch: scores._nll(TINY, outer, h, tokens, stretch)
        )(h)
        sizes[limit] = largest_array(program.jaxpr)
    assert sizes[2**25] == 2 * 128 * VOCAB
    assert sizes[2 * 16 * VOCAB] == 2 * 128 * 8  # the hidden states


def test_one_program_per_kind_of_block():
    model, params = Tiny(blocks=7), make_params(model=Tiny(blocks=7))

    def run():
        for seed in range(3):
            token_log_probs(model, params, jnp.asarray(tokens_of((2, 9), seed)))

    assert compiled_programs(forward._block, run) == 2


def test_vocabulary_size():
    assert forward.vocabulary_size(TINY, make_params()) == VOCAB
