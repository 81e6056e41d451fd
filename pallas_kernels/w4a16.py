"""`w4a16`: activations times an int4 weight, on Hopper, Ada and Ampere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jq.pallas_kernels import reference
from jq.pallas_kernels.ampere.config import CAPABILITIES, W4Config
from jq.pallas_kernels.capability import HOPPER, parse, unserved
from jq.pallas_kernels.config import Config, DecodeConfig, PrefillConfig
from jq.pallas_kernels.weight import W4Weight, operands, unsupported_format

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Mosaic copies rows in tiles of 8, and lowers no array of more rows that does not divide into them.
_TILE_ROWS = 8


def w4a16(
    x: Float[Array, "*B K"],
    w: W4Weight,
    *,
    config: Config | W4Config | None = None,
    interpret: bool = False,
    compute_capability: tuple[int, int] = HOPPER,
) -> Float[Array, "*B N"]:
    """y = x @ w by the kernels, rounded once to x's dtype.

    Args:
      x: `w.dtype` [..., K], any number of rows.
      w: the weight, of logical shape [K, N].
      config: tile sizes, of the device's kernels; None: the fastest known, or estimated, for the
        shape (see `tuning` and `ampere.tuning`).
      interpret: run the kernel's schedule on the CPU, in Mosaic's interpreter, detecting races;
        on Hopper's only.  It wants more threads than a small machine's XLA has: set the
        environment variable NPROC to 48 before JAX is imported.
      compute_capability: of the device: (9, 0), (8, 9), (8, 6) or (8, 0).
    Returns: `w.dtype` [..., N]; sums are float32, in an order that depends on the config alone.
    Raises: ValueError when the sizes or dtypes do not match, or where there is no such kernel.
    """
    _check(x, w)
    m = math.prod(x.shape[:-1])
    if m == 0:
        return jnp.zeros((*x.shape[:-1], w.n), x.dtype)
    rows = x.reshape(m, w.k)
    if compute_capability in CAPABILITIES:
        y = _ampere(rows, w, config, interpret, compute_capability)
    else:
        y = _hopper(rows, w, config, interpret, compute_capability)
    return y.reshape(*x.shape[:-1], w.n)


def _ampere(rows, w: W4Weight, config, interpret: bool, capability: tuple[int, int]):
    """rows [M, K] @ w -> [M, N]."""
    if interpret:
        raise ValueError("Mosaic's interpreter knows none of the instructions of capability 8")
    if not isinstance(config, W4Config | None):
        raise ValueError(f"{config} is of another device's kernels: give an ampere.config.W4Config")
    from jq.pallas_kernels.ampere.w4a16 import w4a16_ampere

    return w4a16_ampere(rows, w, config=config, compute_capability=capability)


def _hopper(rows, w: W4Weight, config, interpret: bool, capability: tuple[int, int]):
    """rows [M, K] @ w -> [M, N]."""
    if reason := unserved(capability):
        raise ValueError(reason)
    m = rows.shape[0]
    config = config or choose(m, w)
    if not isinstance(config, DecodeConfig | PrefillConfig):
        raise ValueError(f"{config} is of another device's kernels: give a config.DecodeConfig")
    if m > _TILE_ROWS and m % _TILE_ROWS:
        rows = jnp.pad(rows, ((0, -m % _TILE_ROWS), (0, 0)))
    # Mosaic is imported when it is needed: a CPU does without.
    if isinstance(config, PrefillConfig):
        from jq.pallas_kernels.w4a16_prefill import prefill

        y = prefill(rows, w, config, interpret)
    else:
        from jq.pallas_kernels.w4a16_decode import decode

        y = decode(rows, w, config, interpret)
    return y[:m]


def w4a16_reference(x: Float[Array, "*B K"], w: W4Weight) -> Float[Array, "*B N"]:
    """The XLA version of `w4a16`, for any backend: the same operands, products and roundings.

    Raises: ValueError when the sizes or dtypes do not match.
    """
    _check(x, w)
    sums = reference.dot(x, operands(w), jnp.float32)
    columns = w.normaliser.reshape((1,) * (x.ndim - 1) + (-1,))
    return (sums * columns).astype(x.dtype)


def choose(m: int, w: W4Weight) -> DecodeConfig | PrefillConfig:
    """The tile sizes that `w4a16` takes for m rows on Hopper."""
    from jq.pallas_kernels import tuning

    return tuning.choose(m, w.k, w.n, **_format(w))


def _format(w: W4Weight) -> dict[str, Any]:
    return {"dtype": w.dtype, "group_size": w.group_size, "symmetric": w.symmetric}


def supported(w: W4Weight, m: int, compute_capability: tuple[int, int] | str) -> str | None:
    """Why the kernels do not serve this weight and number of rows on such a device, or None.

    Args:
      w: the weight, or its shapes (`jax.eval_shape`).
      m: rows of x.
      compute_capability: (9, 0), or "9.0" as devices spell it.
    """
    compute_capability = parse(compute_capability)
    if reason := unserved(compute_capability):
        return reason
    if w.ndim != 2:
        return f"the weight is stacked, {w.shape}: index or scan over the leading axes first"
    if m < 1:
        return "there are no rows"
    if reason := unsupported_format(w.k, w.n, w.group_size, w.dtype):
        return reason
    if compute_capability in CAPABILITIES:
        return None
    from jq.pallas_kernels import tuning

    if tuning.slower_than_xla(m, w.k, w.n, **_format(w)):
        return f"XLA's own product was measured to be faster for {m} rows of this shape"
    return None


def _check(x, w: W4Weight) -> None:
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.k:
        raise ValueError(f"x {x.shape} does not multiply a weight of logical shape {w.shape}")
    if x.dtype != jnp.dtype(w.dtype):
        raise ValueError(f"x is {x.dtype}, but the weight was prepared for {w.dtype}: cast x")
