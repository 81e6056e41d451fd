"""What calibration remembers of the input that a group of linears shares.

Sums, not means, in float32, added sample by sample in a fixed order: the same tokens give the same
statistics whatever the batch size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


# Row panels of the Gram matrix; each starts at its own diagonal block.
PANELS = 4


class InputStats(NamedTuple):
    """Statistics of an input [tokens, K]; every field is float32.

    gram: [K, K], sum of x x' (GPTQ's Hessian up to a factor).
    abs_sum: [K], sum of |x|.
    abs_max: [K], largest |x|.
    count: scalar, tokens seen (padding left out).
    """

    gram: jax.Array
    abs_sum: jax.Array
    abs_max: jax.Array
    count: jax.Array

    @property
    def abs_mean(self) -> jax.Array:
        """[K], mean of |x| (0 where nothing was seen)."""
        return self.abs_sum / jnp.maximum(self.count, 1.0)


def init(k: int) -> InputStats:
    """Statistics of no tokens."""
    return InputStats(
        jnp.zeros((k, k), jnp.float32),
        jnp.zeros((k,), jnp.float32),
        jnp.zeros((k,), jnp.float32),
        jnp.zeros((), jnp.float32),
    )


def update(
    stats: InputStats, x: Float[Array, "T K"], mask: Bool[Array, "T"] | None = None
) -> InputStats:
    """Add the tokens of one sample; rows with mask False are left out.

    Only the upper triangle of `gram` is kept up to date: call `finish` after the last sample.
    """
    if mask is not None:
        x = jnp.where(mask[:, None], x, jnp.zeros((), x.dtype))
        count = jnp.sum(mask).astype(jnp.float32)
    else:
        count = jnp.float32(x.shape[0])
    magnitude = jnp.abs(x.astype(jnp.float32))
    return InputStats(
        _add_gram(stats.gram, x),
        stats.abs_sum + magnitude.sum(axis=0),
        jnp.maximum(stats.abs_max, magnitude.max(axis=0)),
        stats.count + count,
    )


def _add_gram(gram: Float[Array, "K K"], x: Float[Array, "T K"]) -> Float[Array, "K K"]:
    """gram + x' x, in row panels that start at the diagonal: little more than half the work."""
    k = x.shape[1]
    size = panel_size(k)
    for start in range(0, k, size):
        # Products of bfloat16 are exact in float32; float32 must not be cut to TF32 on a GPU.
        panel = lax.dot_general(
            x[:, start : start + size],
            x[:, start:],
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        before = lax.slice(gram, (start, start), (start + size, k))
        gram = lax.dynamic_update_slice(gram, before + panel, (start, start))
    return gram


def panel_size(k: int) -> int:
    """Rows of a panel of the Gram matrix of k inputs."""
    return k // PANELS if k % PANELS == 0 and k >= 64 * PANELS else k


def all_reduce(stats: InputStats, axis_name: str) -> InputStats:
    """Statistics of the tokens of all devices along a mesh axis, on every one of them.

    Before `finish`, inside `jax.shard_map`, `jax.pmap` or `jax.vmap`.  One sum, of the panels that
    `update` fills (5/8 of the Gram matrix), and one maximum of K numbers.
    """
    k = stats.abs_sum.shape[0]
    size = panel_size(k)
    panels = [stats.gram[i : i + size, i:].reshape(-1) for i in range(0, k, size)]
    parts = lax.psum(jnp.concatenate([*panels, stats.abs_sum, stats.count[None]]), axis_name)
    gram, start = jnp.zeros_like(stats.gram), 0
    for row in range(0, k, size):
        panel = parts[start : start + size * (k - row)].reshape(size, k - row)
        gram = lax.dynamic_update_slice(gram, panel, (row, row))
        start += panel.size
    abs_max = lax.pmax(stats.abs_max, axis_name)
    return InputStats(gram, parts[start:-1], abs_max, parts[-1])


def finish(stats: InputStats) -> InputStats:
    """Fill in the lower triangle of `gram`."""
    upper = jnp.triu(stats.gram)
    return stats._replace(gram=upper + jnp.triu(upper, 1).T)


def output_energy(gram: Float[Array, "K K"], w: Float[Array, "K N"]) -> Float[Array, "N"]:
    """Sum over the tokens of (x' w)^2, the diagonal of w' H w, for every output.

    gram: symmetric, as `finish` gives it; half the products of w' (H w) are made.
    w: float32.
    """
    k = w.shape[0]
    size = panel_size(k)
    total = jnp.zeros(w.shape[1:], jnp.float32)
    for start in range(0, k, size):
        panel = gram[start : start + size, start:]
        if size < k:
            # What lies right of the diagonal counts for what lies below it too.
            panel = jnp.triu(panel) + jnp.triu(panel, 1)
        # Not cut to TF32 on a GPU: rounding errors are sought where the inputs hardly see them.
        seen = jnp.matmul(panel, w[start:], precision=lax.Precision.HIGHEST)
        total += jnp.sum(w[start : start + size] * seen, axis=0)
    return total


def rescale(stats: InputStats, scale: Float[Array, "K"]) -> InputStats:
    """Statistics of x / scale."""
    inverse = 1.0 / scale
    return InputStats(
        stats.gram * inverse[:, None] * inverse[None, :],
        stats.abs_sum * inverse,
        stats.abs_max * inverse,
        stats.count,
    )
