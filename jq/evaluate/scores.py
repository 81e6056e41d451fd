"""Scores of single tokens: log-likelihood, KL divergence, agreement of the first choice.

Logits of a large vocabulary are the largest arrays of an evaluation ([B, T, V] float32: 1 GB for
one window of 2048 tokens and 128k entries), so they are made and reduced a stretch of positions at
a time, the reference's and the quantized model's side by side; none are ever kept.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jq.blockwise import BlockwiseModel, Params
from jq.errors import CalibrationError
from jq.evaluate.forward import hidden_states, outer_params, vocabulary_size

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int, Int32

# Logits of one model in memory at once: 128 MB of float32.
_MAX_LOGITS = 2**25


def token_log_probs(
    model: BlockwiseModel, params: Params, tokens: Int32[Array, "B T"]
) -> Float32[Array, "B T-1"]:
    """log p(token t | tokens 0 .. t-1) for t = 1 .. T-1, in nats.

    Args:
        model: see `jq.blockwise`; hashable.
        params: kernels may be QTensors.
        tokens: T of at least 2.

    Raises: CalibrationError when there is nothing to predict.
    """
    if tokens.shape[1] < 2:
        raise CalibrationError(f"tokens {tokens.shape} leave nothing to predict; give 2 or more")
    h = hidden_states(model, params, tokens)
    stretch = _stretch(tokens.shape, vocabulary_size(model, params))
    return -_nll(model, outer_params(model, params), h, tokens, stretch)


def next_token_scores(
    model: BlockwiseModel,
    params: Params,
    tokens: Int32[Array, "B T"],
    targets: Int32[Array, "B T"],
) -> dict[str, jax.Array]:
    """Scores of given next tokens.

    Args:
        model: see `jq.blockwise`; hashable.
        params: kernels may be QTensors.
        tokens: what the model reads; padding may stand at the right.
        targets: what is scored behind each of them.

    Returns: arrays `[B, T]`: "log_prob" (log p(target | tokens up to here), nats, float32) and
        "first" (bool: the target is the first choice).
    """
    h = hidden_states(model, params, tokens)
    batch, length = tokens.shape
    stretch = _stretch((batch, length + 1), vocabulary_size(model, params))
    return _next_token(model, outer_params(model, params), h, targets, stretch)


def paired_scores(
    model: BlockwiseModel,
    params: Params,
    reference_model: BlockwiseModel,
    reference_params: Params,
    tokens: Int32[Array, "B T"],
) -> dict[str, jax.Array]:
    """Scores of the predictions at positions 0 .. T-2 of two models of one vocabulary.

    Returns: arrays `[B, T-1]`: "nll" and "reference_nll" (-log p of the next token, nats), "kl"
        (KL(reference || model), nats), all float32; "top1" (bool, both have the same first choice).
    """
    h = hidden_states(model, params, tokens)
    reference_h = hidden_states(reference_model, reference_params, tokens)
    stretch = _stretch(tokens.shape, vocabulary_size(model, params))
    outer = (outer_params(model, params), outer_params(reference_model, reference_params))
    return _paired((model, reference_model), outer, (h, reference_h), tokens, stretch)


def log_likelihood(
    logits: Float32[Array, "*B V"], targets: Int[Array, "*B"]
) -> Float32[Array, "*B"]:
    """log softmax(logits)[target]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def kl_divergence(
    reference: Float32[Array, "*B V"], logits: Float32[Array, "*B V"]
) -> Float32[Array, "*B"]:
    """KL(p || q) = sum p log(p / q) in nats, p and q the softmax of `reference` and `logits`.

    Written as the sum of p (exp(-d) - 1 + d), d = log p - log q, which differs by sum q - sum p =
    0: no term is negative, and rounding of d, common to all entries through the normalizer, enters
    in the second order only.  Divergences of 1e-6 keep their digits in float32.
    """
    log_p = jax.nn.log_softmax(reference, axis=-1)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    possible = p > 0
    d = jnp.where(possible, log_p - log_q, 0.0)
    near = jnp.clip(d, -1.0, 1.0)
    terms = jnp.where(jnp.abs(d) < 1, p * (jnp.expm1(-near) + near), q - p + p * d)
    return jnp.sum(jnp.where(possible, terms, q), axis=-1)


def same_first_choice(
    reference: Float32[Array, "*B V"], logits: Float32[Array, "*B V"]
) -> Bool[Array, "*B"]:
    """Whether the most likely token is the same (the first one among equals)."""
    return jnp.argmax(reference, axis=-1) == jnp.argmax(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "stretch"))
def _nll(
    model: BlockwiseModel, outer: Params, h: jax.Array, tokens: jax.Array, stretch: int
) -> jax.Array:
    def score(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, targets = piece
        return -log_likelihood(model.logits(outer, h), targets)

    return _over_stretches(score, (h[:, :-1], tokens[:, 1:]), stretch)


@functools.partial(jax.jit, static_argnames=("model", "stretch"))
def _next_token(
    model: BlockwiseModel, outer: Params, h: jax.Array, targets: jax.Array, stretch: int
) -> dict[str, jax.Array]:
    def score(piece: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        h, targets = piece
        logits = model.logits(outer, h)
        first = jnp.argmax(logits, axis=-1) == targets
        return {"log_prob": log_likelihood(logits, targets), "first": first}

    return _over_stretches(score, (h, targets), stretch)


@functools.partial(jax.jit, static_argnames=("models", "stretch"))
def _paired(
    models: tuple[BlockwiseModel, BlockwiseModel],
    outer: tuple[Params, Params],
    h: tuple[jax.Array, jax.Array],
    tokens: jax.Array,
    stretch: int,
) -> dict[str, jax.Array]:
    def score(piece: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, jax.Array]:
        *hs, targets = piece
        logits, reference = (m.logits(o, x) for m, o, x in zip(models, outer, hs, strict=True))
        return {
            "nll": -log_likelihood(logits, targets),
            "reference_nll": -log_likelihood(reference, targets),
            "kl": kl_divergence(reference, logits),
            "top1": same_first_choice(reference, logits),
        }

    return _over_stretches(score, (h[0][:, :-1], h[1][:, :-1], tokens[:, 1:]), stretch)


def _stretch(shape: tuple[int, ...], vocab_size: int) -> int:
    """Positions of tokens `[B, T]` scored at once, so that their logits fit; evenly spread."""
    batch, length = shape[0], shape[1] - 1
    largest = max(1, _MAX_LOGITS // (batch * vocab_size))
    return -(-length // -(-length // largest))


def _over_stretches(score, arrays, stretch: int):
    """`score` of arrays `[B, S, ...]`, `stretch` positions at a time -> pytree of `[B, S]`."""
    batch, length = arrays[0].shape[:2]
    count = -(-length // stretch)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * stretch - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, stretch, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * stretch)[:, :length]

    return jax.tree.map(join, jax.lax.map(score, jax.tree.map(split, arrays)))
