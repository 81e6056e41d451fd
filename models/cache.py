"""Where tokens stand, and the keys and values of the tokens seen so far.

Slots and positions are two things: a token's slot says where it is stored, its position says how it
is rotated and who may see it.  A slot without a real token has the position `EMPTY`, which is later
than any query's, so causality alone hides padding, left or right, and the unused end of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.models.config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

EMPTY = int(np.iinfo(np.int32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Positions of the queries `[B, T]` and of the key slots `[B, S]`, int32."""

    queries: Any
    keys: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers; a pytree, updated functionally.

    Attributes:
        keys, values: per layer `[B, S, KV, hd]`, keys already rotated.
        positions: int32 `[B, S]`, `EMPTY` where there is no real token.
        length: int32 scalar, the number of slots used; rows share it.
    """

    keys: Any
    values: Any
    positions: Any
    length: Any

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]


def init_cache(
    config: ModelConfig, batch_size: int, capacity: int, dtype: Any = jnp.float32
) -> KVCache:
    """An empty cache of `capacity` slots per row."""
    shape = (batch_size, capacity, config.num_key_value_heads, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        positions=jnp.full((batch_size, capacity), EMPTY, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def positions_of(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count the real tokens of each row; padding repeats its neighbour's, from 0."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)


def make_places(
    shape: tuple[int, int],
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    cache: KVCache | None = None,
) -> Places:
    """Places of `[B, T]` new tokens, after those of the cache where there is one.

    Args:
        shape: (B, T).
        positions: int32 `[B, T]`; counted from the mask and the cache when None.
        mask: bool `[B, T]`, True for real tokens; all when None.
    """
    mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
    if positions is None:
        positions = positions_of(mask)
        if cache is not None:
            seen = jnp.sum(cache.positions != EMPTY, axis=-1, keepdims=True, dtype=jnp.int32)
            positions = positions + jnp.broadcast_to(seen, shape)
    positions = jnp.asarray(positions, jnp.int32)
    keys = jnp.where(mask, positions, EMPTY)
    if cache is not None:
        keys = jax.lax.dynamic_update_slice(
            cache.positions, keys, (jnp.zeros((), jnp.int32), cache.length)
        )
    return Places(positions, keys)
