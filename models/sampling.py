"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jq.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the default is greedy.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: draw from the k most likely tokens only; ties go to the lower token id.
        top_p: draw from the smallest set of most likely tokens whose probability, after
            temperature and top_k, reaches p (Holtzman et al. 2020, "The curious case of neural text
            degeneration", section 3.1).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ModelError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ModelError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ModelError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def candidates(
    logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Int32[Array, "B C"], Float[Array, "B C"], Bool[Array, "B C"]]:
    """Tokens that may be drawn: ids from the most likely down, scaled logits, and which are in.

    C is min(top_k, V), or V without top_k.  `sampling.temperature` must not be 0.
    """
    vocabulary = logits.shape[-1]
    count = vocabulary if sampling.top_k is None else min(sampling.top_k, vocabulary)
    scaled, ids = jax.lax.top_k(logits.astype(jnp.float32) / sampling.temperature, count)
    if sampling.top_p is None:
        return ids, scaled, jnp.ones(ids.shape, bool)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first token is always in, even where rounding makes `before` positive.
    inside = (before < sampling.top_p) | (jnp.arange(count) == 0)[None]
    return ids, scaled, inside


def sample(
    logits: Float[Array, "B V"], key: jax.Array | None, sampling: Sampling
) -> Int32[Array, " B"]:
    """One token per row; -1 where the row's largest logit is not finite.

    Row i draws with `fold_in(key, i)`, so that a row's tokens do not depend on the batch's size.
    `key` may be None for greedy sampling.
    """
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        if key is None:
            raise ModelError("sampling with a temperature needs a key: jax.random.key(seed)")
        ids, scaled, inside = candidates(logits, sampling)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(logits)))
        drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(inside, scaled, -jnp.inf))
        tokens = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    return jnp.where(finite, tokens, -1)
