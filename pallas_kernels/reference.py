"""XLA reference of every quantized matrix product.

Shapes: x [..., K], codes [K, N] (unpacked), y [..., N].  Scales are float32.  The results define
what the GPU kernels must give; XLA fuses the dequantization on most backends but is free to
materialise it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INT8_MAX = 127.0
FP8_MAX = 448.0


def dot(x: jax.Array, w: jax.Array, out: jnp.dtype | type) -> jax.Array:
    """[..., K] @ [K, N] accumulated in `out` (int32 for int8 operands, float32 for the rest)."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out)


def weight_only(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w with w dequantized to x's dtype, accumulated in float32, returned in x's dtype."""
    return dot(x, w.astype(x.dtype), jnp.float32).astype(x.dtype)


def rms_norm(x: jax.Array, gain: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * gain over the last axis, in float32, rounded to x's dtype.

    Zhang & Sennrich (2019), arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return (wide * jnp.broadcast_to(gain.astype(jnp.float32), x.shape)).astype(x.dtype)


def activation_scale(x: jax.Array, dtype: jnp.dtype, axes: int | None) -> jax.Array:
    """max|x| / (largest code) over `axes` (None: all), keeping dimensions; 1 where x is all zero.

    NaN where x holds NaN, so that it reaches the result: int8 codes could not carry it.
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True)
    scale = largest * smallest_step(dtype)
    return jnp.where(scale == 0, 1.0, scale)


def smallest_step(dtype: jnp.dtype) -> np.float32:
    """float32(1 / largest code).  XLA divides by constants so, and by what it broadcasts: spelled
    out, the products are the same on every backend."""
    return np.float32(1) / np.float32(INT8_MAX if dtype == jnp.int8 else FP8_MAX)


def quantize_activations(x: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Nearest int8 or float8_e4m3fn codes of x * (1 / scale), clipped to the format's finite range.

    The clip comes before the cast: JAX's float8_e4m3fn cast turns values beyond 448 into NaN.
    """
    scaled = x.astype(jnp.float32) * (1 / scale)
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(scaled), -INT8_MAX, INT8_MAX).astype(jnp.int8)
    return jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)


def scaled_matmul(
    x: jax.Array, x_scale: jax.Array, w: jax.Array, w_scale: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """8-bit dot with the scales applied to the accumulator.

    Args:
      x: int8 or float8_e4m3fn [..., K].
      x_scale: float32 [..., 1] (per token) or a scalar (per tensor).
      w: the same dtype [K, N].
      w_scale: float32 [1, N] or [1, 1].
      out_dtype: dtype of the result.
    Returns: [..., N].
    """
    accumulator = dot(x, w, jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
    columns = w_scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return (accumulator.astype(jnp.float32) * x_scale * columns).astype(out_dtype)


def block_scaled_matmul(
    x: jax.Array, x_scale: jax.Array, w: jax.Array, w_scale: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """float8 dot with one scale per token and g inputs, and per g x g block of the weight.

    Args:
      x: float8_e4m3fn [..., G, g].
      x_scale: float32 [..., G, 1].
      w: float8_e4m3fn [G * g, N].
      w_scale: float32 [G, N / g].
      out_dtype: dtype of the result.
    Returns: [..., N].
    """
    groups, size = x.shape[-2:]
    n = w.shape[1]
    lead = x.shape[:-2]
    flat = x.reshape(-1, groups, size)
    partial = lax.dot_general(
        flat,
        w.reshape(groups, size, n),
        (((2,), (1,)), ((1,), (0,))),
        preferred_element_type=jnp.float32,
    )  # [G, rows, N]
    columns = jnp.repeat(w_scale, n // w_scale.shape[1], axis=1)
    partial = partial * jnp.moveaxis(x_scale.reshape(-1, groups, 1), 1, 0) * columns[:, None, :]
    return partial.sum(axis=0).reshape(*lead, n).astype(out_dtype)
