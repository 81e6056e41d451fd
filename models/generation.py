"""Text generation: one prefill, then one jitted step per token on a key-value cache.

Prompts are padded on the left to a bucketed length and the cache's capacity is bucketed too, so a
few programs serve all lengths.  The cache is donated to each step and updated in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jq.errors import ModelError, NonFiniteError
from jq.models.cache import KVCache, init_cache
from jq.models.decoder import Decoder
from jq.models.sampling import Sampling, sample
from jq.models.tokenizer import TextStream, Tokenizer
from jq.sharded import ShardedTensor
from jq.sharding import axes_of

FINISHED = -1
_SMALLEST_BUCKET = 32
_LARGEST_DOUBLING = 512


def bucket(length: int) -> int:
    """The next power of two from 32 to 512; beyond, the next multiple of 512."""
    if length > _LARGEST_DOUBLING:
        return -(-length // _LARGEST_DOUBLING) * _LARGEST_DOUBLING
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def stream(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Generate for a batch of prompts, step by step.

    Args:
        model, params: the decoder and its parameters, quantized or not.
        prompts: token ids; lengths may differ, and a row's result does not depend on the others.
        max_new_tokens: per prompt.
        sampling: greedy when None.
        key: `jax.random.key(seed)`; needed with a temperature.
        eos_token_ids: a row ends after any of these; None takes the config's, () never ends.

    Yields:
        int32 `[B]`, each row's new token, `FINISHED` for rows that have ended, until all have.

    Raises:
        ModelError: no prompt, an empty one, a token id outside the vocabulary, more tokens than the
            model has positions, or no key where one is needed.
        NonFiniteError: logits are NaN or infinite.
    """
    sampling = Sampling() if sampling is None else sampling
    _check_request(model, prompts, max_new_tokens, sampling, key)
    eos = model.config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
    return _stream(model, params, prompts, max_new_tokens, sampling, key, eos)


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, up to and including an end-of-sequence token.

    Arguments and errors as in `stream`.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, params, prompts, max_new_tokens, sampling, key, eos_token_ids):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if token != FINISHED:
                row.append(token)
    return rows


def stream_text(
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
) -> Iterator[str]:
    """Continue one prompt, as pieces of text that are whole characters.

    Ends at any of the tokenizer's end-of-sequence tokens, which are not part of the text.
    Arguments and errors as in `stream`.
    """
    text = TextStream(tokenizer)
    ids = tokenizer.encode(prompt)
    for tokens in stream(
        model, params, [ids], max_new_tokens, sampling, key, tokenizer.eos_token_ids
    ):
        if int(tokens[0]) in tokenizer.eos_token_ids:
            break
        if piece := text.push(int(tokens[0])):
            yield piece
    if rest := text.flush():
        yield rest


def _stream(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
    eos: tuple[int, ...],
) -> Iterator[np.ndarray]:
    tokens, mask = _pad_left(prompts)
    capacity = bucket(tokens.shape[1] + max_new_tokens)
    ahead = _prefill(model, sampling, capacity, params, tokens, mask, key)
    ended = np.zeros(len(prompts), bool)
    for index in range(max_new_tokens):
        token, cache = ahead
        if index + 1 < max_new_tokens:
            # Dispatched before the host waits for this step's tokens, to keep the device busy.
            ahead = _step(model, sampling, params, token, cache, key, np.int32(index + 1))
        new = np.asarray(token)
        _check_finite(new, ended, index)
        new = np.where(ended, np.int32(FINISHED), new)
        yield new
        ended |= np.isin(new, eos)
        if ended.all():
            return


@partial(jax.jit, static_argnames=("model", "sampling", "capacity"))
def _prefill(
    model: Decoder,
    sampling: Sampling,
    capacity: int,
    params: Any,
    tokens: Any,
    mask: Any,
    key: jax.Array | None,
) -> tuple[jax.Array, KVCache]:
    batch, length = tokens.shape
    cache = init_cache(model.config, batch, capacity, model.dtype)
    last = jnp.full((batch,), length - 1, jnp.int32)
    output: Any = model.apply({"params": params}, tokens, mask=mask, cache=cache, at=last)
    logits, cache = output
    return sample(logits[:, 0], _step_key(key, 0), sampling), _placed(model, params, cache)


@partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames=("cache",))
def _step(
    model: Decoder,
    sampling: Sampling,
    params: Any,
    token: jax.Array,
    cache: KVCache,
    key: jax.Array | None,
    index: Any,
) -> tuple[jax.Array, KVCache]:
    tokens = jnp.maximum(token, 0)[:, None]
    output: Any = model.apply({"params": params}, tokens, cache=cache)
    logits, cache = output
    return sample(logits[:, 0], _step_key(key, index), sampling), _placed(model, params, cache)


def _placed(model: Decoder, params: Any, cache: KVCache) -> KVCache:
    """The cache where quantized weights that are cut over a mesh make keys and values: a compiler
    that may choose cuts them otherwise, and gathers all of them at every step."""
    maker = params[model.block_names[0]]["attention"]["k_proj"]["kernel"]
    if not isinstance(maker, ShardedTensor):
        return cache
    whole = model.config.num_key_value_heads % axes_of(maker.mesh, maker.n) > 0
    lies = NamedSharding(maker.mesh, P(None, None, None if whole else maker.n, None))
    keys, values = jax.lax.with_sharding_constraint((cache.keys, cache.values), lies)
    return dataclasses.replace(cache, keys=keys, values=values)


def _step_key(key: jax.Array | None, index: Any) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, index)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and bool mask `[B, T]` with T bucketed."""
    shape = (len(prompts), bucket(max(len(prompt) for prompt in prompts)))
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, shape[1] - len(prompt) :] = prompt
        mask[row, shape[1] - len(prompt) :] = True
    return tokens, mask


def _check_request(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
) -> None:
    if not len(prompts) or max_new_tokens < 1:
        raise ModelError(
            f"generation needs a prompt and max_new_tokens >= 1, got {len(prompts)} prompts and "
            f"max_new_tokens {max_new_tokens}"
        )
    if sampling.temperature > 0 and key is None:
        raise ModelError("sampling with a temperature needs a key: jax.random.key(seed)")
    limit, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ModelError(f"prompt {row} is empty; give at least one token, such as bos")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ModelError(
                f"prompt {row} has token id {wrong}, outside the model's vocabulary of "
                f"{vocabulary}; tokenizer and model do not belong together"
            )
        if len(prompt) + max_new_tokens > limit:
            raise ModelError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} "
                f"that exceeds the model's {limit} positions; shorten either"
            )


def _check_finite(tokens: np.ndarray, ended: np.ndarray, index: int) -> None:
    bad = np.flatnonzero((tokens < 0) & ~ended)
    if bad.size:
        raise NonFiniteError(
            f"logits of prompt {bad[0]} are NaN or infinite at new token {index}; check the "
            "weights for non-finite values, or the activations' range in the chosen dtype"
        )
