"""`quantize_rows`: 8-bit codes of activations, with a scale per row or per 128 of a row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jq.pallas_kernels import reference
from jq.pallas_kernels.capability import ADA, SERVED, spell

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32

GROUP = 128
# Rows of smaller values count as zeros: the reciprocals of their scales might overflow.
TINY = 2.0**-64
_THREADS = 128
# What the registers of a block hold; a normalised row lies in them twice.
_ROW_BYTES = 64 * 1024


def quantize_rows(
    x: Float[Array, "*B K"],
    dtype: str,
    *,
    group: int | None = None,
    norm: tuple[jax.Array, float] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Float32[Array, "*B G"]]:
    """Codes and scales of x in one kernel that reads x once.

    Args:
      x: bfloat16, float16 or float32 [..., K].
      dtype: of the codes, "int8" or "float8_e4m3fn".
      group: inputs that share a scale: None, the whole row, or 128.
      norm: (gain [K], epsilon) of an RMSNorm to apply to x first; its result is rounded to x's
        dtype, as a model's own is.
      interpret: run the kernel's schedule on the CPU, in Mosaic's interpreter.
    Returns: codes [..., K], and float32 scales [..., 1] or [..., K / 128]: max|x| / 127 (float8:
      448), or 1 where x is zero.
    Raises: ValueError for what `supported_rows` has a reason against.

    The result is `quantize_rows_reference`'s bit for bit, with these exceptions: rows whose
    largest |x| is below 2^-64 count as zeros; codes of rows that hold NaN or infinities are
    anything (their scale is NaN or infinite); and with `norm` the sum of squares is added in
    another order, so that a normalised value may be the next number of x's dtype.
    """
    k = x.shape[-1]
    if reason := _unsupported(k, x.dtype.name, dtype, group, norm is not None):
        raise ValueError(f"activations of shape {x.shape} cannot be quantized by rows: {reason}")
    scales = (*x.shape[:-1], 1 if group is None else k // group)
    if x.size == 0:
        return jnp.zeros(x.shape, dtype), jnp.ones(scales, jnp.float32)
    # Mosaic is imported when it is needed: a CPU does without.
    from jq.pallas_kernels import quantize_rows_kernel as kernel

    if group is None:
        gain, epsilon = norm or (None, None)
        codes, scale = kernel.quantize(x.reshape(-1, k), dtype, gain, epsilon, interpret)
    else:
        codes, scale = kernel.quantize_groups(x.reshape(-1, group), dtype, interpret)
    return codes.reshape(x.shape), scale.reshape(scales)


def quantize_rows_reference(
    x: Float[Array, "*B K"],
    dtype: str,
    *,
    group: int | None = None,
    norm: tuple[jax.Array, float] | None = None,
) -> tuple[jax.Array, Float32[Array, "*B G"]]:
    """The XLA version of `quantize_rows`, for any backend, any K and any group that divides it."""
    if norm is not None:
        x = reference.rms_norm(x, *norm)
    kind = jnp.dtype(dtype)
    parts = x if group is None else x.reshape(*x.shape[:-1], -1, group)
    scale = reference.activation_scale(parts, kind, -1)
    codes = reference.quantize_activations(parts, scale, kind)
    return codes.reshape(x.shape), scale if group is None else scale[..., 0]


def supported_rows(
    k: int,
    x_dtype: str,
    dtype: str,
    compute_capability: tuple[int, int],
    *,
    group: int | None = None,
    norm: bool = False,
) -> str | None:
    """Why the kernel does not quantize rows of k values on such a device, or None if it does."""
    if compute_capability not in SERVED:
        known = ", ".join(map(spell, SERVED))
        return f"the kernel is for compute capabilities {known}, not {spell(compute_capability)}"
    if dtype != "int8" and compute_capability < ADA:
        return f"compute capability {spell(compute_capability)} has no float8"
    return _unsupported(k, x_dtype, dtype, group, norm)


def vector_size(k: int, dtype: Any) -> int:
    """Values that a thread reads at once: as many as 16 bytes hold and divide the row evenly."""
    return math.gcd(k // _THREADS, 16 // jnp.dtype(dtype).itemsize)


def _unsupported(k: int, x_dtype: str, dtype: str, group: int | None, norm: bool) -> str | None:
    if dtype not in ("int8", "float8_e4m3fn"):
        return f"codes are int8 or float8_e4m3fn, not {dtype}"
    if x_dtype not in ("bfloat16", "float16", "float32"):
        return f"x is {x_dtype}, the kernel takes bfloat16, float16 and float32"
    if group not in (None, GROUP):
        return f"a group has {GROUP} values, not {group}"
    if k == 0 or k % _THREADS:
        return f"K = {k} is no multiple of {_THREADS}"
    if group is not None:
        return "groups are not normalised by the kernel: apply the norm first" if norm else None
    # A register holds two 16-bit values, unless they are read one by one.
    size = k * max(jnp.dtype(x_dtype).itemsize, 4 // vector_size(k, x_dtype))
    limit = _ROW_BYTES // 2 if norm else _ROW_BYTES
    if size > limit:
        return f"a row takes {size} bytes of registers, more than the {limit} that a block has"
    return None
