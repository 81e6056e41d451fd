"""Causal grouped-query attention with padding, sliding windows and a key-value cache."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jq.kernels.activations import QuantizedActivations
from jq.models.cache import Places
from jq.models.config import ModelConfig
from jq.models.layers import Linear, RMSNorm
from jq.models.rope import rotary_tables, rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

# Queries and keys in the same slots are cut into CAUSAL_PIECES pieces of at least SMALLEST_PIECE
# queries, each of which reads only the keys up to its own end.  No more than MAX_QUERIES are
# processed at a time, so that the scores' memory grows as T, not T^2.
CAUSAL_PIECES = 4
SMALLEST_PIECE = 64
MAX_QUERIES = 512

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
    """softmax(q k^T / sqrt(hd)) v with float32 scores.

    Query head h reads key head h // (H / KV).  Where S = T, queries and keys are the same tokens,
    and positions must not decrease along a row (padding aside).
    """
    heads = _by_head(q, k, v)
    length, slots = q.shape[1], k.shape[1]
    piece = max(-(-length // CAUSAL_PIECES), SMALLEST_PIECE)
    if length == slots and piece <= MAX_QUERIES:
        out = _attend_causal_pieces(*heads, places, window, piece)
    else:
        out = _attend_mapped(*heads, places, window)
    return jnp.moveaxis(out, 3, 1).astype(q.dtype).reshape(q.shape)


def _by_head(
    q: Float[Array, "B T H hd"], k: Float[Array, "B S KV hd"], v: Float[Array, "B S KV hd"]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, KV, G, T, hd]`, keys `[B, KV, hd, S]` and values `[B, KV, S, hd]`.

    Heads outermost: every product is then a plain matrix product per head, which is what CPUs and
    GPUs are fast at.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    return grouped.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)


def _attend_causal_pieces(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, window: int | None, piece: int
) -> jax.Array:
    """Queries piece by piece, each with the keys up to its end only."""
    length = q.shape[3]
    out = []
    for start in range(0, length, piece):
        end = min(start + piece, length)
        seen = visible(places.queries[:, start:end], places.keys[:, :end], window)
        out.append(_attend(q[..., start:end, :], k[..., :end], v[..., :end, :], seen))
    return jnp.concatenate(out, axis=3)


def _attend_mapped(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, window: int | None
) -> jax.Array:
    """All keys for every query, at most MAX_QUERIES queries at a time."""
    length = q.shape[3]
    size = min(length, MAX_QUERIES)
    chunks = -(-length // size)
    pad = chunks * size - length
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, pad), (0, 0)])
    queries = jnp.pad(places.queries, [(0, 0), (0, pad)])

    def one(start: Any) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(queries, start, size, axis=1)
        seen = visible(rows, places.keys, window)
        return _attend(jax.lax.dynamic_slice_in_dim(q, start, size, axis=3), k, v, seen)

    if chunks == 1:
        return one(0)
    # [chunks, B, KV, G, size, hd], as lax.map stacks them
    out = jnp.moveaxis(jax.lax.map(one, jnp.arange(chunks) * size), 0, 3)
    return out.reshape(q.shape)[..., :length, :]


def _attend(
    q: Float[Array, "B KV G T hd"],
    k: Float[Array, "B KV hd S"],
    v: Float[Array, "B KV S hd"],
    seen: Bool[Array, "B T S"],
) -> Float[Array, "B KV G T hd"]:
    """Float32; normalised after the sum over keys, where the array is the smaller one."""
    scores = jnp.einsum("bkgtd,bkds->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores * q.shape[-1] ** -0.5, _HIDDEN)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out / total


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
        self,
        x: Float[Array, "B T D"] | QuantizedActivations,
        places: Places,
        past: tuple[Any, Any, Any] | None = None,
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
