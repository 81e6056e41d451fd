"""`W8Weight`: an int8 or float8 weight as the kernels of every GPU family read it.

The 8-bit tensor cores take both operands with the inputs (K) contiguous, so the codes are stored
[N, K]; nothing else is shuffled.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Shaped

DTYPES = ("int8", "float8_e4m3fn")
MULTIPLE = 64  # of K and N
BLOCK = 128  # inputs and columns of a block with one scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class W8Weight:
    """An 8-bit weight [..., K, N]; make it with `w8_weight`.

    Arrays (pytree children; leading axes are stacked layers):
      codes: int8 or float8_e4m3fn [..., N, K].
      scale: float32 [..., N], or [..., N/128, K/128] where `block` is 128.
    Static:
      block: 128, with float8 only: a scale per 128 x 128 block of the weight, and per row and 128
        inputs of the activations (DeepSeek-V3, arXiv:2412.19437, section 3.3.2); None: a scale per
        column, and per row (or one for all rows) of the activations.

    Shards of all arrays along N, or along K (the scales of columns replicated), are weights again,
    when they are cut at multiples of 64, or of the block.
    """

    codes: jax.Array
    scale: jax.Array
    block: int | None = dataclasses.field(metadata={"static": True})

    @property
    def k(self) -> int:
        return self.codes.shape[-1]

    @property
    def n(self) -> int:
        return self.codes.shape[-2]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the codes, and of the activations that it multiplies."""
        return jnp.dtype(self.codes.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., K, N]."""
        return (*self.codes.shape[:-2], self.k, self.n)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return self.codes.nbytes + self.scale.nbytes


def unsupported_format8(k: int, n: int, dtype: Any, block: int | None = None) -> str | None:
    """Why the kernels' format cannot hold such a weight, or None if it can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"codes are {name}, the kernels take int8 and float8_e4m3fn"
    if block is not None and name == "int8":
        return "int8 weights have a scale per column, not per block"
    if block not in (None, BLOCK):
        return f"scales are per {block} x {block} block, the kernels take {BLOCK} x {BLOCK}"
    multiple = block or MULTIPLE
    for axis, size in (("K", k), ("N", n)):
        if size == 0 or size % multiple:
            return f"{axis} = {size} is no multiple of {multiple}"
    return None


def w8_weight(codes: Shaped[Array, "*B K N"], scale: Float32[Array, "*B Gk Gn"]) -> W8Weight:
    """Bring an 8-bit weight into the kernels' order.  Runs under jit and vmap.

    Args:
      codes: int8 or float8_e4m3fn [..., K, N].
      scale: float32 [..., 1, N] per column; [..., 1, 1] for the tensor, which is repeated for each
        column; [..., K/128, N/128] per block, float8 only.
    Raises: ValueError for sizes that the format does not hold (see `unsupported_format8`).
    """
    k, n = codes.shape[-2:]
    rows, columns = scale.shape[-2:]
    # One block for all of the weight is one scale for the tensor: the same arithmetic.
    per_column = rows == 1 and columns in (1, n)
    block = None if per_column else BLOCK
    if reason := unsupported_format8(k, n, codes.dtype, block):
        raise ValueError(f"the weight {codes.shape} has no kernel format: {reason}")
    if not per_column and (rows, columns) != (k // BLOCK, n // BLOCK):
        raise ValueError(
            f"scales {scale.shape} are neither per column, [..., 1, {n}], nor per block, "
            f"[..., {k // BLOCK}, {n // BLOCK}], of the weight {codes.shape}"
        )
    if per_column:
        scale = jnp.broadcast_to(scale[..., 0, :], (*scale.shape[:-2], n))
    else:
        scale = jnp.swapaxes(scale, -1, -2)
    return W8Weight(jnp.swapaxes(codes, -1, -2), scale, block)


def dequantize(w: W8Weight) -> Float32[Array, "*B K N"]:
    """codes * scale, float32 [..., K, N]."""
    codes = jnp.swapaxes(w.codes, -1, -2).astype(jnp.float32)
    if w.block is None:
        return codes * w.scale[..., None, :]
    scale = jnp.swapaxes(w.scale, -1, -2)
    scale = jnp.repeat(jnp.repeat(scale, w.block, axis=-2), w.block, axis=-1)
    return codes * scale
