"""Scores in batches and with shared contexts, against one plain pass per pair."""

import functools

import jax
import numpy as np
import pytest

from jq.errors import NonFiniteError, SpecError
from jq.tasks import shared
from jq.tasks.scoring import Pair, fit_pair, score_pairs
from tests.jq.tasks.tiny import CONTEXT

RNG = np.random.default_rng(0)


def ids(count):
    return tuple(RNG.integers(1, 280, count).tolist())


def family(length, *continuations):
    context = ids(length)
    return [Pair(context, ids(n)) for n in continuations]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


def expected(model, params, pair):
    """log p and greediness, in float64, of one pass over the tokens as they are."""
    tokens = np.zeros((1, CONTEXT), np.int32)
    tokens[0, : len(pair.inputs)] = pair.inputs
    logits = np.asarray(_logits(model, params, tokens), np.float64)[0]
    log_p = logits - np.log(np.exp(logits - logits.max()).sum(1, keepdims=True)) - logits.max()
    places = np.arange(len(pair.context) - 1, len(pair.inputs))
    targets = np.asarray(pair.continuation)
    return log_p[places, targets].sum(), bool((logits[places].argmax(1) == targets).all())


PAIRS = [
    *family(20, 1, 4, 18, 3),  # shared, several widths
    *family(33, 1, 1, 1),  # choices of one token
    *family(18, 2, 2),
    *family(3, 5, 6),  # too short to be shared
    *family(40, 24),  # alone, and as long as the context allows
    *family(1, 60),
]


@pytest.fixture(scope="module")
def scored(model):
    model, params, _ = model
    return score_pairs(model, params, PAIRS, batch_size=4, max_length=CONTEXT)


def test_scores_are_those_of_single_passes(model, scored):
    model, params, _ = model
    for pair, score in zip(PAIRS, scored, strict=True):
        log_prob, greedy = expected(model, params, pair)
        assert score.log_prob == pytest.approx(log_prob, rel=1e-5)
        assert score.greedy == greedy


def greedy_pair(model, params, context, count):
    tokens = list(context)
    for _ in range(count):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(_logits(model, params, padded)[0, len(tokens) - 1])))
    return Pair(tuple(context), tuple(tokens[len(context) :]))


@pytest.mark.parametrize("length", [5, 20], ids=["alone", "shared"])
def test_greedy_continuations_are_told_from_others(model, length):
    model, params, _ = model
    best = greedy_pair(model, params, ids(length), 3)
    others = []
    for place in range(3):
        tokens = list(best.continuation)
        tokens[place] = tokens[place] % 279 + 1
        others.append(Pair(best.context, tuple(tokens)))
    scores = score_pairs(model, params, [best, *others], batch_size=2, max_length=CONTEXT)
    assert [score.greedy for score in scores] == [True, False, False, False]


def test_batches_and_order_change_nothing(model, scored):
    model, params, _ = model
    order = RNG.permutation(len(PAIRS))
    again = score_pairs(model, params, [PAIRS[i] for i in order], batch_size=3, max_length=CONTEXT)
    for i, score in zip(order, again, strict=True):
        assert score.log_prob == pytest.approx(scored[i].log_prob, rel=1e-5)
        assert score.greedy == scored[i].greedy


def test_a_shared_context_is_read_once_and_equal_pairs_are_computed_once(model, monkeypatch):
    model, params, _ = model
    read, rows, steps = [], [], []
    real = shared._read, shared._continue
    monkeypatch.setattr(shared, "_read", lambda *a: read.append(a[2].shape) or real[0](*a))
    monkeypatch.setattr(shared, "_continue", lambda *a: rows.append(a[5].shape) or real[1](*a))
    pairs = family(20, 2, 3, 4) * 2
    score_pairs(
        model, params, pairs, batch_size=4, max_length=CONTEXT,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert read == [(4, 32)]
    assert rows == [(4, 17)]
    assert steps == [(3, 3)]


def test_few_programs_serve_all_lengths(model):
    model, params, _ = model
    before = shared._read._cache_size(), shared._continue._cache_size()
    pairs = [pair for n in range(17, 32) for pair in family(n, 1 + n % 9, 2, 3)]
    score_pairs(model, params, pairs, batch_size=5, max_length=CONTEXT)
    after = shared._read._cache_size(), shared._continue._cache_size()
    assert after[0] - before[0] == 1
    assert after[1] - before[1] == 1


def test_pairs_are_cut_at_the_left():
    context, continuation = tuple(range(10)), (20, 21, 22)
    assert fit_pair(context, continuation, 12) == Pair(context, continuation)
    # The last token is not read: one more fits than the context has.
    assert fit_pair(context, continuation, 11) == Pair(context[1:], continuation)
    assert len(fit_pair(context, continuation, 11).inputs) == 11
    assert fit_pair(context, continuation, 3) == Pair((9,), continuation)
    with pytest.raises(SpecError, match="3 tokens does not fit into the model's context of 2"):
        fit_pair(context, continuation, 2)
    with pytest.raises(SpecError, match="empty text"):
        fit_pair(context, (), 5)
    with pytest.raises(SpecError, match="after nothing"):
        fit_pair((), continuation, 5)


@pytest.mark.parametrize("pairs", [PAIRS[-1:], PAIRS[:2]], ids=["alone", "shared"])
def test_numbers_that_are_none_are_refused(model, pairs):
    model, params, _ = model
    broken = params | {"final_norm": {"scale": params["final_norm"]["scale"] * np.nan}}
    with pytest.raises(NonFiniteError, match=r"is nan \(request 0\)"):
        score_pairs(model, broken, pairs, batch_size=2, max_length=CONTEXT)
