"""Continuations of shared contexts: the prefix cache of the tasks.

Contexts are padded on the left, so that their keys and values end in one slot; each continuation
then gets a copy of its context's cache. The context's own logits predict a continuation's first
token: choices of a single token ("A", "B", ...) need no further pass at all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.evaluate.scores import log_likelihood
from jq.models.cache import EMPTY, KVCache, init_cache
from jq.models.decoder import Decoder
from jq.models.generation import bucket

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int32

# Logits in memory at once: 128 MB of float32.
_MAX_LOGITS = 2**25
# Tokens of a continuation behind its first one are padded to 16, 64, 256, ...
_NARROWEST, _STEP = 16, 4


def score_shared(
    model: Decoder,
    params: Any,
    contexts: Sequence[Sequence[int]],
    rows: Sequence[tuple[int, Sequence[int]]],
    batch_size: int,
    max_length: int,
) -> list[tuple[float, bool]]:
    """(log p, whether greedy decoding writes it) of continuations.

    Args:
        model, params: the decoder and its parameters, quantized or not.
        contexts: token ids, at most batch_size of them.
        rows: (number of the context, token ids of the continuation).
        batch_size: contexts, and continuations, that run at once.
        max_length: the longest shape of a context.
    """
    tokens, mask = _pad_contexts(contexts, batch_size, max_length)
    last, cache = _read(model, params, tokens, mask)
    scores: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][1]))
    while order:
        width = _width(len(rows[order[0]][1]))
        count = max(1, min(batch_size, _MAX_LOGITS // (width * last.shape[-1])))
        some, order = order[:count], order[count:]
        owner, targets, real = _pad_continuations([rows[i] for i in some], count, width)
        sums, greedy = _continue(model, params, cache, last, owner, targets, real)
        for i, log_prob, first in zip(some, np.asarray(sums), np.asarray(greedy), strict=False):
            scores[i] = (float(log_prob), bool(first))
    return scores


def _width(length: int) -> int:
    """1, 17, 65, 257, ...: the first token and a padded number of further ones."""
    width = _NARROWEST
    while width < length - 1:
        width *= _STEP
    return 1 if length == 1 else 1 + width


def _pad_contexts(
    contexts: Sequence[Sequence[int]], batch_size: int, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and bool mask `[B, T]`, contexts at the right; rows without one have a token."""
    length = min(bucket(max(map(len, contexts))), max_length)
    tokens, mask = np.zeros((batch_size, length), np.int32), np.zeros((batch_size, length), bool)
    mask[:, -1] = True
    for row, context in enumerate(contexts):
        tokens[row, length - len(context) :] = context
        mask[row, length - len(context) :] = True
    return tokens, mask


def _pad_continuations(
    rows: Sequence[tuple[int, Sequence[int]]], count: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int32 owners `[R]`, int32 targets and bool mask `[R, C]`."""
    owner = np.zeros(count, np.int32)
    targets, real = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
    for row, (context, continuation) in enumerate(rows):
        owner[row] = context
        targets[row, : len(continuation)] = continuation
        real[row, : len(continuation)] = True
    return owner, targets, real


@functools.partial(jax.jit, static_argnames="model")
def _read(model: Decoder, params: Any, tokens: Any, mask: Any) -> tuple[jax.Array, KVCache]:
    """Logits behind each context, float32 `[B, V]`, and its keys and values."""
    batch, length = tokens.shape
    cache = init_cache(model.config, batch, length, model.dtype)
    last = jnp.full((batch,), length - 1, jnp.int32)
    output: Any = model.apply({"params": params}, tokens, mask=mask, cache=cache, at=last)
    logits, cache = output
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames="model")
def _continue(
    model: Decoder,
    params: Any,
    cache: KVCache,
    last: Float32[Array, "B V"],
    owner: Int32[Array | np.ndarray, " R"],
    targets: Int32[Array | np.ndarray, "R C"],
    real: Bool[Array | np.ndarray, "R C"],
) -> tuple[Float32[Array, " R"], Bool[Array, " R"]]:
    """Sums of log p over the real targets, and whether each of them is the first choice."""
    targets, real = jnp.asarray(targets), jnp.asarray(real)
    logits = last[owner][:, None]
    if targets.shape[1] > 1:
        copies = _copy(cache, owner, targets.shape[1] - 1)
        # Behind the last target nothing is asked; what padding writes, nobody reads.
        output: Any = model.apply(
            {"params": params}, targets[:, :-1], mask=real[:, :-1], cache=copies
        )
        logits = jnp.concatenate([logits, output[0]], axis=1)
    chosen = jnp.where(real, log_likelihood(logits, targets), 0.0)
    first = (jnp.argmax(logits, axis=-1) == targets) | ~real
    return jnp.sum(chosen, axis=1), jnp.all(first, axis=1)


def _copy(cache: KVCache, owner: Any, room: int) -> KVCache:
    """The owners' caches, one per row, with `room` empty slots behind."""

    def rows(store: jax.Array, fill: int) -> jax.Array:
        widths = [(0, 0), (0, room)] + [(0, 0)] * (store.ndim - 2)
        return jnp.pad(store[owner], widths, constant_values=fill)

    return KVCache(
        keys=tuple(rows(x, 0) for x in cache.keys),
        values=tuple(rows(x, 0) for x in cache.values),
        positions=rows(cache.positions, EMPTY),
        length=cache.length,
    )
