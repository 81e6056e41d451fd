"""The decoder against the float64 oracle, and against itself in other ways of running."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import tree
from jq.models import attention
from jq.models.cache import init_cache, make_places
from jq.models.decoder import Decoder
from tests.models import checkpoints
from tests.models.running import TOKENS, forward, relative_error
from tests.oracles.decoder import decoder_logits


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_logits_agree_with_the_oracle(load, name):
    model, params, raw, weights = load(name)
    logits = forward(model, params, TOKENS)
    assert logits.dtype == jnp.float32
    want = np.stack([decoder_logits(raw, weights, row) for row in TOKENS])
    assert relative_error(logits, want) < 2e-5


def padded(lengths, width):
    """TOKENS' rows cut to these lengths, the first padded on the left, the second on the right."""
    tokens, mask = np.full((2, width), 7, np.int32), np.zeros((2, width), bool)
    for row, length in enumerate(lengths):
        at = slice(width - length, width) if row == 0 else slice(0, length)
        tokens[row, at], mask[row, at] = TOKENS[row, :length], True
    return tokens, mask


@pytest.mark.parametrize("name", ["llama3", "qwen3-layers"])
def test_padding_changes_nothing(load, name):
    model, params, raw, weights = load(name, layers=1)
    lengths = [9, 12]
    tokens, mask = padded(lengths, 14)
    logits = np.asarray(forward(model, params, tokens, mask=mask))
    for row, length in enumerate(lengths):
        want = decoder_logits(raw, weights, TOKENS[row, :length])
        assert relative_error(logits[row][mask[row]], want) < 2e-5
    assert np.isfinite(logits).all()


def test_a_row_of_padding_only_is_finite(load):
    model, params, _, _ = load("llama3", layers=1)
    mask = np.ones((2, 14), bool)
    mask[1] = False
    assert np.isfinite(forward(model, params, TOKENS, mask=mask)).all()


@pytest.mark.parametrize("name", ["llama3", "qwen3-layers"])
def test_cached_decoding_is_the_full_forward(load, name):
    model, params, raw, weights = load(name)
    lengths = [3, 5]
    tokens, mask = padded(lengths, 6)
    cache = init_cache(model.config, 2, 16)
    at = np.array([np.flatnonzero(m)[-1] for m in mask], np.int32)
    logits, cache = forward(model, params, tokens, mask=mask, cache=cache, at=at)
    got = [logits]
    for step in range(6):
        token = np.stack([TOKENS[row, n + step : n + step + 1] for row, n in enumerate(lengths)])
        logits, cache = forward(model, params, token, cache=cache)
        got.append(logits)
    got = np.concatenate(got, axis=1)
    for row, length in enumerate(lengths):
        want = decoder_logits(raw, weights, TOKENS[row, : length + 6])[length - 1 :]
        assert relative_error(got[row], want) < 2e-5
    assert int(cache.length) == 12


def test_explicit_positions_are_used(load):
    model, params, _, _ = load("llama3", layers=1)
    base = np.broadcast_to(np.arange(14, dtype=np.int32), TOKENS.shape)
    plain = np.asarray(forward(model, params, TOKENS), np.float64)
    shifted = forward(model, params, TOKENS, positions=base + 3)
    stretched = forward(model, params, TOKENS, positions=base * 2)
    assert relative_error(shifted, plain) < 1e-4  # rotary embeddings are relative
    assert relative_error(stretched, plain) > 1e-2


@pytest.mark.parametrize(("window", "max_queries"), [(None, 512), (3, 512), (None, 1), (3, 3)])
def test_attention_in_pieces_is_the_same(monkeypatch, window, max_queries):
    """14 queries: in four causal pieces, or mapped in 14 or 5 chunks."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(0, 1, (2, 14, h, 6)), jnp.float32) for h in (4, 2, 2))
    mask = np.ones((2, 14), bool)
    mask[0, :3] = mask[1, 9:] = False
    places = make_places((2, 14), mask=mask)
    whole = np.asarray(attention.attend(q, k, v, places, window))
    names = ("CAUSAL_PIECES", "SMALLEST_PIECE", "MAX_QUERIES")
    for name, value in zip(names, (4, 1, max_queries), strict=True):
        monkeypatch.setattr(attention, name, value)
    calls = []
    original = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *a: calls.append(a) or original(*a))
    pieces = np.asarray(attention.attend(q, k, v, places, window))
    np.testing.assert_allclose(pieces[mask], whole[mask], rtol=0, atol=2e-6)
    assert len(calls) == (4 if max_queries == 512 else 1)  # lax.map traces once


def test_bfloat16_parameters_and_activations(load):
    model, params, raw, weights = load("llama3", layers=1)
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = {k: v.astype(jnp.bfloat16) for k, v in weights.items()}
    want = decoder_logits(raw, exact, TOKENS[0])
    # bf16 weights in float32 arithmetic lose nothing; bf16 activations lose 8 bits of mantissa.
    assert relative_error(forward(model, small, TOKENS[:1])[0], want) < 2e-5
    half = Decoder(model.config, dtype=jnp.bfloat16)
    logits = forward(half, small, TOKENS[:1])
    assert logits.dtype == jnp.float32
    error = np.asarray(logits[0], np.float64) - want
    assert 1e-4 < np.std(error) / np.std(want) < 0.05


@pytest.mark.parametrize("name", ["llama-bias-gelu", "qwen2", "qwen3"])
def test_init_makes_the_tree_that_checkpoints_have(load, name):
    model, params, _, _ = load(name)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    shapes = {path: leaf.shape for path, leaf in tree.leaves(made["params"])}
    assert shapes == {path: leaf.shape for path, leaf in tree.leaves(params)}


def test_init_makes_parameters_of_param_dtype(load):
    model, _, _, _ = load("llama3", layers=1)
    half = Decoder(model.config, param_dtype=jnp.bfloat16)
    made = jax.eval_shape(lambda: half.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert {leaf.dtype for _, leaf in tree.leaves(made["params"])} == {jnp.dtype(jnp.bfloat16)}
