"""`w8a8`: 8-bit activations times an 8-bit weight, int8 or float8."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jq.pallas_kernels import reference
from jq.pallas_kernels.ampere.config import W8Config
from jq.pallas_kernels.capability import ADA, HOPPER, parse, spell, unserved
from jq.pallas_kernels.config8 import Config8, Prefill8Config
from jq.pallas_kernels.weight8 import W8Weight, unsupported_format8

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Shaped

OUTPUTS = ("bfloat16", "float16")
# Mosaic copies rows in tiles of 8, and lowers no array of more rows that does not divide into them.
_TILE_ROWS = 8


def w8a8(
    x_codes: Shaped[Array, "*B K"],
    x_scale: Float32[Array, "..."],
    w: W8Weight,
    *,
    bias: Float[Array, "..."] | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Config8 | W8Config | None = None,
    interpret: bool = False,
    compute_capability: tuple[int, int] = HOPPER,
) -> Float[Array, "*B N"]:
    """y = (x_codes @ w.codes^T) * scales + bias by the kernels, rounded once to `out_dtype`.

    Args:
      x_codes: int8 or float8_e4m3fn, as the weight's, [..., K], any number of rows.
      x_scale: float32 [..., 1] per row, or [] for all of them; [..., K/128] where the weight's
        scales are per block.
      w: the weight, of logical shape [K, N].
      bias: [N], bfloat16, float16 or float32; added in float32.
      out_dtype: bfloat16 or float16.
      config: tile sizes, of the device's kernels; None: the fastest known, or estimated, for the
        shape (see `choose8` and `ampere.tuning`).
      interpret: run the kernel's schedule on the CPU, in Mosaic's interpreter, detecting races;
        on Hopper's only.  It wants more threads than a small machine's XLA has: set the
        environment variable NPROC to 48 before JAX is imported.
      compute_capability: of the device: (9, 0) or (8, 9), or for int8 (8, 6) or (8, 0) too.
    Returns: `out_dtype` [..., N].  int8 products are summed exactly, in int32.  float8 products are
      summed by the tensor cores over 128 inputs at a time, and those sums in float32.
    Raises: ValueError when the sizes or dtypes do not match, or where there is no such kernel.
    """
    _check(x_codes, x_scale, w, bias, out_dtype)
    lead, m = x_codes.shape[:-1], math.prod(x_codes.shape[:-1])
    if m == 0:
        return jnp.zeros((*lead, w.n), out_dtype)
    if reason := _no_kernels(w.dtype, compute_capability):
        raise ValueError(reason)
    rows = x_codes.reshape(m, w.k)
    if compute_capability == HOPPER:
        y = _hopper(rows, x_scale, w, bias, out_dtype, config, interpret)
    else:
        if interpret:
            raise ValueError("Mosaic's interpreter knows none of the instructions of capability 8")
        if not isinstance(config, W8Config | None):
            raise ValueError(f"{config} is of another device's kernels: give a W8Config")
        from jq.pallas_kernels.ampere.w8a8 import w8a8_ampere

        y = w8a8_ampere(
            rows,
            _row_scale(x_scale, m, w),
            w,
            bias=bias,
            out_dtype=out_dtype,
            config=config,
            compute_capability=compute_capability,
        )
    return y.reshape(*lead, w.n)


def _hopper(rows, x_scale, w: W8Weight, bias, out_dtype, config, interpret: bool):
    """rows [M, K] @ w -> [M, N]."""
    m = rows.shape[0]
    config = config or choose8(m, w)
    if isinstance(config, W8Config):
        raise ValueError(f"{config} is of another device's kernels: give a config8.Decode8Config")
    if m > _TILE_ROWS and m % _TILE_ROWS:
        rows = jnp.pad(rows, ((0, -m % _TILE_ROWS), (0, 0)))
    # The scales of a block's rows lie beside each other.
    scale = _row_scale(x_scale, m, w).T.reshape(-1)
    # Mosaic is imported when it is needed: a CPU does without.
    if isinstance(config, Prefill8Config):
        from jq.pallas_kernels.w8a8_prefill import prefill8

        y = prefill8(rows, scale, w, bias, out_dtype, config, interpret)
    else:
        from jq.pallas_kernels.w8a8_decode import decode8

        y = decode8(rows, scale, w, bias, out_dtype, config, interpret)
    return y[:m]


def w8a8_reference(
    x_codes: Shaped[Array, "*B K"],
    x_scale: Float32[Array, "..."],
    w: W8Weight,
    *,
    bias: Float[Array, "..."] | None = None,
    out_dtype: Any = jnp.bfloat16,
) -> Float[Array, "*B N"]:
    """The XLA version of `w8a8`, for any backend: the same products, scales and one rounding.

    Without a bias it is `reference.scaled_matmul` or `reference.block_scaled_matmul`, bit for bit.
    `out_dtype` may be float32 too.
    Raises: ValueError when the sizes or dtypes do not match.
    """
    _check(x_codes, x_scale, w, bias, out_dtype, (*OUTPUTS, "float32"))
    codes = w.codes.T
    sums = jnp.dtype(jnp.float32 if bias is not None else out_dtype)
    if w.block is None:
        y = reference.scaled_matmul(x_codes, x_scale, codes, w.scale[None, :], sums)
    else:
        blocks = x_codes.reshape(*x_codes.shape[:-1], -1, w.block)
        scale = x_scale[..., None]
        y = reference.block_scaled_matmul(blocks, scale, codes, w.scale.T, sums)
    if bias is not None:
        y = (y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))).astype(out_dtype)
    return y


def supported8(w: W8Weight, m: int, compute_capability: tuple[int, int] | str) -> str | None:
    """Why the kernels do not serve this weight and number of rows on such a device, or None.

    Args:
      w: the weight, or its shapes (`jax.eval_shape`).
      m: rows of x.
      compute_capability: (9, 0), or "9.0" as devices spell it.
    """
    compute_capability = parse(compute_capability)
    if reason := _no_kernels(w.dtype, compute_capability):
        return reason
    if w.ndim != 2:
        return f"the weight is stacked, {w.shape}: index or scan over the leading axes first"
    if m < 1:
        return "there are no rows"
    if reason := unsupported_format8(w.k, w.n, w.dtype, w.block):
        return reason
    if compute_capability != HOPPER:
        return None
    from jq.pallas_kernels import tuning8

    if tuning8.slower_than_xla(m, w.k, w.n, dtype=w.dtype.name, block=w.block):
        return f"XLA's own product was measured to be faster for {m} rows of this shape"
    return None


def choose8(m: int, w: W8Weight) -> Config8:
    """The tile sizes that `w8a8` takes for m rows on Hopper."""
    from jq.pallas_kernels import tuning8

    return tuning8.choose(m, w.k, w.n, dtype=w.dtype.name, block=w.block)


def _no_kernels(dtype: jnp.dtype, capability: tuple[int, int]) -> str | None:
    """Why there are no kernels for codes of a dtype on such a device, or None if there are."""
    if reason := unserved(capability):
        return reason
    if dtype != jnp.int8 and capability < ADA:
        return (
            "float8 kernels are for compute capability 8.9 (Ada) and 9.0 (Hopper): the tensor "
            f"cores of {spell(capability)} multiply int8"
        )
    return None


def _row_scale(x_scale: jax.Array, m: int, w: W8Weight) -> jax.Array:
    """float32 [m], or [m, K/128]."""
    if w.block is None:
        return jnp.broadcast_to(x_scale.reshape(-1), (m,))
    return x_scale.reshape(m, w.k // w.block)


def _check(x, x_scale, w, bias, out_dtype, outputs=OUTPUTS) -> None:
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.k:
        raise ValueError(f"x {x.shape} does not multiply a weight of logical shape {w.shape}")
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype}, but the weight {w.dtype}: quantize x to {w.dtype}")
    allowed = {(*x.shape[:-1], 1), ()}
    if w.block is not None:
        allowed = {(*x.shape[:-1], w.k // w.block)}
    if x_scale.shape not in allowed:
        spelled = " or ".join(str(list(shape)) for shape in sorted(allowed, key=len, reverse=True))
        raise ValueError(f"the scales of x {x.shape} have to be {spelled}, not {x_scale.shape}")
    if bias is not None and bias.shape != (w.n,):
        raise ValueError(f"the bias of a weight {w.shape} has to be [{w.n}], not {bias.shape}")
    if jnp.dtype(out_dtype).name not in outputs:
        raise ValueError(f"out_dtype is {out_dtype}: take one of {', '.join(outputs)}")
