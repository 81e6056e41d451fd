"""`w4a16`: activations times an int4 weight, on Hopper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jq.pallas_kernels import reference
from jq.pallas_kernels.weight import W4Weight, operands, unsupported_format

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def w4a16_reference(x: Float[Array, "*B K"], w: W4Weight) -> Float[Array, "*B N"]:
    """The XLA version of `w4a16`, for any backend: the same operands, products and roundings."""
    sums = reference.dot(x, operands(w), jnp.float32)
    columns = w.normaliser.reshape((1,) * (x.ndim - 1) + (-1,))
    return (sums * columns).astype(x.dtype)


def w4a16(
    x: Float[Array, "*B K"], w: W4Weight, *, config=None, interpret: bool = False
) -> Float[Array, "*B N"]:
    """y = x @ w, rounded once to x's dtype.

    Args:
      x: `w.dtype` [..., K], any number of rows.
      w: the weight, of logical shape [K, N].
    Returns: `w.dtype` [..., N]; sums are float32.
    Raises: ValueError when the sizes or dtypes do not match.
    """
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.k:
        raise ValueError(f"x {x.shape} does not multiply a weight of logical shape {w.shape}")
    if x.dtype != jnp.dtype(w.dtype):
        raise ValueError(f"x is {x.dtype}, but the weight was prepared for {w.dtype}: cast x")
    return w4a16_reference(x, w)


def supported(w: W4Weight, m: int, compute_capability: tuple[int, int] | str) -> str | None:
    """Why the kernels do not serve this weight and number of rows on such a device, or None."""
    major, minor = _capability(compute_capability)
    if (major, minor) != (9, 0):
        return f"the kernels are for compute capability 9.0 (Hopper), not {major}.{minor}"
    if w.ndim != 2:
        return f"the weight is stacked, {w.shape}: index or scan over the leading axes first"
    if m < 1:
        return "there are no rows"
    return unsupported_format(w.k, w.n, w.group_size, w.dtype)


def _capability(value: tuple[int, int] | str) -> tuple[int, int]:
    if isinstance(value, str):
        major, _, minor = value.partition(".")
        return int(major), int(minor or 0)
    return value
