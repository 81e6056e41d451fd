"""Generation on a cache: the same tokens as full forwards, in batches and alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import tree
from jq.errors import ModelError, NonFiniteError
from jq.models import generation
from jq.models.generation import FINISHED, bucket, generate, stream
from jq.models.sampling import Sampling
from tests.models.running import TOKENS
from tests.oracles.decoder import decoder_logits

PROMPTS = [TOKENS[0, :4].tolist(), TOKENS[1, :11].tolist(), TOKENS[0, 5:6].tolist()]
NEVER = ()
SAMPLING = Sampling(1.5, top_k=40, top_p=0.98)


@pytest.fixture(scope="module")
def model(load):
    return load("qwen3-layers", layers=1)


def test_greedy_tokens_are_the_oracles(model):
    decoder, params, raw, weights = model
    rows = generate(decoder, params, PROMPTS, 6, eos_token_ids=NEVER)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tokens = list(prompt)
        for token in row:
            assert token == decoder_logits(raw, weights, tokens)[-1].argmax()
            tokens.append(token)
        assert len(row) == 6


def test_a_batch_draws_what_its_first_prompt_draws_alone(model):
    decoder, params, _, _ = model
    key = jax.random.key(5)
    together = generate(decoder, params, PROMPTS, 6, SAMPLING, key, NEVER)
    alone = generate(decoder, params, PROMPTS[:1], 6, SAMPLING, key, NEVER)
    assert together[0] == alone[0]


def test_seeds_decide(model):
    decoder, params, _, _ = model

    def run(seed):
        return generate(decoder, params, PROMPTS, 6, SAMPLING, jax.random.key(seed), NEVER)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_rows_end_after_their_own_end_token(model):
    decoder, params, _, _ = model
    free = generate(decoder, params, PROMPTS, 6, eos_token_ids=NEVER)
    eos = free[0][1]
    rows = generate(decoder, params, PROMPTS, 6, eos_token_ids=[eos])
    for row, unbounded in zip(rows, free, strict=True):
        end = unbounded.index(eos) + 1 if eos in unbounded else 6
        assert row == unbounded[:end]
    steps = list(stream(decoder, params, PROMPTS[:1], 6, eos_token_ids=[eos]))
    assert len(steps) == len(rows[0]) < 6
    ragged = np.stack(list(stream(decoder, params, PROMPTS, 6, eos_token_ids=[eos])))
    assert (ragged[len(rows[0]) :, 0] == FINISHED).all()


def test_the_configs_end_tokens_are_the_default(model):
    decoder, params, _, _ = model
    free = generate(decoder, params, PROMPTS[:1], 6)
    assert len(free[0]) == 6  # this config has none
    config = decoder.config.with_changes(eos_token_ids=(free[0][0],))
    assert generate(decoder.clone(config=config), params, PROMPTS[:1], 6) == [free[0][:1]]


def test_lengths_in_a_bucket_share_one_program(model):
    decoder, params, _, _ = model
    # Equal but for a number that no program depends on: compiled by no other test.
    decoder = decoder.clone(config=decoder.config.with_changes(max_position_embeddings=60))
    programs: list[Any] = [generation._prefill, generation._step]
    before = [program._cache_size() for program in programs]
    for length, count in [(1, 5), (3, 5), (10, 5), (20, 5), (20, 12)]:
        generate(decoder, params, [list(range(length))], count, eos_token_ids=NEVER)
    assert [program._cache_size() for program in programs] == [n + 1 for n in before]


def test_the_cache_is_updated_in_place(model):
    decoder, params, _, _ = model
    tokens, mask = generation._pad_left(PROMPTS)
    token, cache = generation._prefill(decoder, Sampling(), 64, params, tokens, mask, None)
    index = np.int32(1)
    _, after = generation._step(decoder, Sampling(), params, token, cache, None, index)
    assert all(old.is_deleted() for old in jax.tree.leaves(cache))
    assert int(after.length) == tokens.shape[1] + 1
    assert after.capacity == 64


@pytest.mark.parametrize(
    ("length", "size"), [(1, 32), (32, 32), (33, 64), (512, 512), (513, 1024), (1025, 1536)]
)
def test_buckets(length, size):
    assert bucket(length) == size


def test_one_token_needs_no_step(model):
    decoder, params, _, _ = model
    assert [len(row) for row in generate(decoder, params, PROMPTS, 1)] == [1, 1, 1]


def test_logits_that_are_not_finite_are_an_error(model):
    decoder, params, _, _ = model
    broken = tree.replace(params, "final_norm/scale", jnp.full((32,), jnp.nan))
    with pytest.raises(NonFiniteError, match="prompt 0 are NaN or infinite at new token 0"):
        generate(decoder, broken, PROMPTS, 3)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 3, "got 0 prompts"),
        ([[1]], 0, "max_new_tokens 0"),
        ([[1], []], 3, "prompt 1 is empty"),
        ([[1, 64]], 3, "prompt 0 has token id 64, outside the model's vocabulary of 64"),
        ([[1, -1]], 3, "token id -1"),
        ([[1] * 60], 5, "60 tokens; with max_new_tokens 5 that exceeds the model's 64 positions"),
    ],
)
def test_bad_requests_are_refused_before_any_compute(model, prompts, count, message):
    decoder, params, _, _ = model
    with pytest.raises(ModelError, match=message):
        stream(decoder, params, prompts, count)


def test_sampling_without_a_key_is_refused(model):
    decoder, params, _, _ = model
    with pytest.raises(ModelError, match="needs a key"):
        generate(decoder, params, PROMPTS, 3, Sampling(1.0))
