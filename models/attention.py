"""Causal grouped-query attention with padding, sliding windows and a key-value cache."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jq.models.cache import Places
from jq.models.config import ModelConfig
from jq.models.layers import Linear, RMSNorm
from jq.models.rope import rotary_tables, rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

# Longer query sequences are processed in chunks, so that the scores' memory grows as T, not T^2.
QUERY_CHUNK = 512
MAX_UNCHUNKED = 1024

# Finite, so that a row that sees nothing (all padding) gives numbers and not NaN.
_HIDDEN = -1e30


def visible(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Whether the query at one position sees the key at another: 0 <= q - k (< window)."""
    q, k = queries[:, :, None], keys[:, None, :]
    seen = k <= q
    # k > q - window, not q - k < window: an empty slot's position is the largest int32.
    return seen if window is None else seen & (k > q - window)


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B S KV hd"],
    v: Float[Array, "B S KV hd"],
    places: Places,
    window: int | None = None,
) -> Float[Array, "B T H hd"]:
    """softmax(q k^T / sqrt(hd)) v, scores in float32; query head h reads key head h // (H/KV)."""
    length = q.shape[1]
    if length <= MAX_UNCHUNKED:
        return _attend(q, places.queries, k, v, places.keys, window)
    chunks = -(-length // QUERY_CHUNK)
    pad = chunks * QUERY_CHUNK - length

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, QUERY_CHUNK, *x.shape[2:]), 1, 0)

    def one(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(*chunk, k, v, places.keys, window)

    out = jnp.moveaxis(jax.lax.map(one, (split(q), split(places.queries))), 0, 1)
    return out.reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def _attend(
    q: jax.Array,
    queries: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    window: int | None,
) -> jax.Array:
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(
        visible(queries, keys, window)[:, None, None], scores * head_dim**-0.5, _HIDDEN
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape)


class Attention(nn.Module):
    """Attention in two steps: `mix` makes the input of `o_proj`, `output` runs it."""

    config: ModelConfig
    window: int | None = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        linear = partial(
            Linear, initializer_range=c.initializer_range, param_dtype=self.param_dtype
        )
        self.q_proj = linear(c.num_attention_heads * c.head_dim, use_bias=c.qkv_bias)
        self.k_proj = linear(c.num_key_value_heads * c.head_dim, use_bias=c.qkv_bias)
        self.v_proj = linear(c.num_key_value_heads * c.head_dim, use_bias=c.qkv_bias)
        self.o_proj = linear(c.hidden_size, use_bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.rms_norm_eps, self.param_dtype)
            self.k_norm = RMSNorm(c.rms_norm_eps, self.param_dtype)

    def mix(
        self, x: Float[Array, "B T D"], places: Places, past: tuple[Any, Any, Any] | None = None
    ) -> tuple[Float[Array, "B T C"], tuple[Any, Any] | None]:
        """Everything before `o_proj`.

        Args:
            x: the normalised input.
            places: positions of the new tokens and of all key slots.
            past: None, or the layer's cached keys and values `[B, S, KV, hd]` and the slot at which
                the new ones are written.
        Returns:
            `[B, T, H*hd]`, and the updated keys and values (None without `past`).
        """
        c = self.config
        q = self._split(self.q_proj(x), c.num_attention_heads)
        k = self._split(self.k_proj(x), c.num_key_value_heads)
        v = self._split(self.v_proj(x), c.num_key_value_heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rotary_tables(c.rope, c.head_dim, places.queries)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        present = None
        if past is not None:
            k, v = present = _write(past[0], k, past[2]), _write(past[1], v, past[2])
        out = attend(q, k.astype(q.dtype), v.astype(q.dtype), places, self.window)
        return out.reshape(*out.shape[:2], -1), present

    def output(self, x: Float[Array, "B T C"]) -> Float[Array, "B T D"]:
        return self.o_proj(x)

    def _split(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:-1], heads, self.config.head_dim)


def _write(store: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    zero = jnp.zeros((), jnp.int32)
    return jax.lax.dynamic_update_slice(store, new.astype(store.dtype), (zero, slot, zero, zero))
