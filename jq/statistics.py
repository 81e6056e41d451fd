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
    """Add the tokens of one sample; rows with mask False are left out."""
    if mask is not None:
        x = jnp.where(mask[:, None], x, jnp.zeros((), x.dtype))
        count = jnp.sum(mask).astype(jnp.float32)
    else:
        count = jnp.float32(x.shape[0])
    # Products of bfloat16 are exact in float32; float32 inputs must not be cut to TF32 on a GPU.
    gram = lax.dot_general(
        x,
        x,
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    magnitude = jnp.abs(x.astype(jnp.float32))
    return InputStats(
        stats.gram + gram,
        stats.abs_sum + magnitude.sum(axis=0),
        jnp.maximum(stats.abs_max, magnitude.max(axis=0)),
        stats.count + count,
    )


def rescale(stats: InputStats, scale: Float[Array, "K"]) -> InputStats:
    """Statistics of x / scale."""
    inverse = 1.0 / scale
    return InputStats(
        stats.gram * inverse[:, None] * inverse[None, :],
        stats.abs_sum * inverse,
        stats.abs_max * inverse,
        stats.count,
    )
