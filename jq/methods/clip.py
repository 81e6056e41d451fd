"""Clipping: shrink a group's range when that lowers the rounding error.

A range [lo, hi] is tried at `STEPS` shrink factors 1, 1 - 1/STEPS*MAX_SHRINK, ...; each group of
each output keeps the factor with the least loss.  Two losses: weighted squared error, sum_k h_k
(w_k - q_k)^2, and the squared error of the group's share of the output, d' H d with d = w - q and H
the group's block of the Gram matrix of the inputs (AWQ's clip search, arXiv 2306.00978 section 3.2
and its code, summed over all tokens).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jq import grid
from jq.spec import QuantSpec

STEPS = 20
MAX_SHRINK = 0.5


def search_range(
    groups: jax.Array,
    lo: jax.Array,
    hi: jax.Array,
    spec: QuantSpec,
    loss: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The shrunken range with the least loss.

    Args:
      groups: float32 [G, g, N].
      lo, hi: float32 [G, 1, N], the full range.
      spec: the grid.
      loss: error [G, g, N] -> [G, 1, N].
    Returns: (lo, hi), float32 [G, 1, N].
    """

    def attempt(step, best):
        best_loss, best_factor = best
        factor = 1.0 - MAX_SHRINK * step / STEPS
        scale, zero = grid.scale_and_zero(lo * factor, hi * factor, spec)
        value = loss(groups - grid.fake_quantize(groups, scale, zero, spec))
        value = grid.over_shared_outputs(value, spec, jnp.sum)
        better = value < best_loss
        return jnp.where(better, value, best_loss), jnp.where(better, factor, best_factor)

    start = jnp.full(lo.shape, jnp.inf, jnp.float32), jnp.ones(lo.shape, jnp.float32)
    _, factor = jax.lax.fori_loop(0, STEPS, attempt, start)
    return lo * factor, hi * factor


def squared_error(importance: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
    """Loss sum_k h_k d_k^2; importance h is [G, g, 1] or None for ones."""

    def loss(error: jax.Array) -> jax.Array:
        square = error * error
        return jnp.sum(square if importance is None else square * importance, axis=1, keepdims=True)

    return loss


def output_error(gram: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Loss d' H d per group and output; gram holds each group's block, [G, g, g]."""

    def loss(error: jax.Array) -> jax.Array:
        pulled = jnp.einsum("gij,gjn->gin", gram, error, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(error * pulled, axis=1, keepdims=True)

    return loss


def gram_blocks(gram: jax.Array, groups: int) -> jax.Array:
    """[K, K] -> the diagonal blocks [G, g, g]."""
    size = gram.shape[0] // groups
    tiles = gram.reshape(groups, size, groups, size)
    return jax.vmap(lambda i: tiles[i, :, i, :])(jnp.arange(groups))
