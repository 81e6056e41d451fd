"""`W4Weight`: an int4 weight as the Hopper kernels read it.

The scales are stored so that two packed bit operations and one or two packed multiplications turn
codes into operands (`dequant`).  bfloat16 and float16 read a 4-bit code u, placed in the low bits
of an otherwise zero half-word, as the number u * unit, exact and below the smallest normal number.
Per column the scales are divided by a power of two r, which brings the largest into [1, 2), so
that any scale fits the dtype; the kernels multiply the float32 sums by what was left out.

    symmetric      a = round(u * unit * S - 8 * unit * S),  S = (scale / r) * 2^A
    zero points    a = round((u * unit * P - z * unit * P) * T),  P = 2^B, T = (scale / r) * 2^D

Both round once (the first difference is exact in each), so a is exactly the rounded value of
(u - z) * scale / r times a power of two.  (float16 has few exponents: in its symmetric form, groups
with less than 1/8 of a column's largest scale lose up to 2^-17 of its largest weight.)  A column
with one scale (a per-channel weight) keeps nothing but powers of two before the sum: there a is
exact.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from jq.pallas_kernels import layout

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, UInt8

GROUP_SIZES = (32, 64, 128)
DType = Literal["bfloat16", "float16"]
SYMMETRIC_ZERO = 8


@dataclasses.dataclass(frozen=True)
class Trick:
    """Powers of two of the dequantization in one dtype.

    unit: a code u in the low bits of a half-word is the number u * 2^unit.
    symmetric: A in the formulas of this module.
    zero: B, and D.
    """

    unit: int
    symmetric: int
    zero: tuple[int, int]

    def remainder(self, symmetric: bool) -> int:
        """e, where the operand is (u - z) * scale / r * 2^-e."""
        return -(self.unit + (self.symmetric if symmetric else sum(self.zero)))


# The largest powers with 15 * 16 * unit * 2^A finite for scales in [1, 2], and the operand normal.
TRICKS = {
    "bfloat16": Trick(unit=-133, symmetric=126, zero=(126, 0)),
    "float16": Trick(unit=-24, symmetric=14, zero=(15, 9)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class W4Weight:
    """An int4 weight [..., K, N] in fragments; make it with `w4_weight`.

    Arrays (pytree children; leading axes are stacked layers):
      fragments: int32 [..., N/64, K/64, 4, 128] (see `layout`).
      scale: `dtype` [..., G, N], S or T of this module's formulas; G = K / group_size, or 1.
      offset: `dtype` [..., G, N], -z * unit * P; None for symmetric weights.
      normaliser: float32 [..., N], the factor of each column's sum.
    Static:
      group_size: 32, 64 or 128 inputs per scale; None: one scale per column.
      dtype: of the activations it multiplies.

    Shards of all arrays along N, or along K at multiples of 64 and of the group size (the
    normaliser and per-column scales replicated), are weights again.
    """

    fragments: jax.Array
    scale: jax.Array
    offset: jax.Array | None
    normaliser: jax.Array
    group_size: int | None = dataclasses.field(metadata={"static": True})
    dtype: DType = dataclasses.field(metadata={"static": True})

    @property
    def k(self) -> int:
        return self.fragments.shape[-3] * layout.TILE

    @property
    def n(self) -> int:
        return self.fragments.shape[-4] * layout.TILE

    @property
    def symmetric(self) -> bool:
        return self.offset is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., K, N]."""
        return (*self.fragments.shape[:-4], self.k, self.n)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def unsupported_format(k: int, n: int, group_size: int | None, dtype: str) -> str | None:
    """Why the packed format cannot hold such a weight, or None if it can."""
    if dtype not in TRICKS:
        return f"activations are {dtype}, the kernels take bfloat16 and float16"
    for name, size in (("K", k), ("N", n)):
        if size == 0 or size % layout.TILE:
            return f"{name} = {size} is no multiple of {layout.TILE}"
    if group_size is None or group_size == k:
        return None
    if group_size not in GROUP_SIZES:
        return f"group size {group_size} is none of 32, 64, 128 and per channel"
    if k % group_size:
        return f"K = {k} is no multiple of the group size {group_size}"
    return None


def w4_weight(
    codes: UInt8[Array, "*B K N"],
    scale: Float32[Array, "*B G N"],
    zero: UInt8[Array, "*B G N"] | None = None,
    *,
    dtype: DType = "bfloat16",
) -> W4Weight:
    """Bring a quantized weight into the kernels' order.  Runs under jit and vmap.

    Args:
      codes: uint8 [..., K, N] in 0..15, meaning (code - zero) * scale.
      scale: float32 [..., G, N]; one per K / G consecutive inputs and column.  It is rounded to
        `dtype` (after an exact division by a power of two) where G > 1, and kept exactly where
        G = 1.
      zero: uint8 [..., G, N] in 0..15; None for symmetric codes, whose zero is 8.
      dtype: of the activations it will multiply.
    Raises: ValueError for sizes that the format does not hold (see `unsupported_format`).
    """
    k, n = codes.shape[-2:]
    groups = scale.shape[-2]
    if groups == 0 or k % groups:
        raise ValueError(f"{groups} groups of scales do not divide K = {k} of the weight")
    group_size = None if groups == 1 else k // groups
    if reason := unsupported_format(k, n, group_size, dtype):
        raise ValueError(f"the weight {codes.shape} cannot be packed into fragments: {reason}")
    trick = TRICKS[dtype]
    unit_scale, power = _normalise(scale)
    normaliser = jnp.ldexp(power, trick.remainder(zero is None))
    if group_size is None:
        # One scale per column commutes with the sum: nothing of it needs rounding.
        normaliser = normaliser * unit_scale[..., 0, :]
        unit_scale = jnp.ones_like(unit_scale)
    # ldexp in float32: 2^126 is finite there, and the cast rounds the mantissa once.
    exponent = trick.symmetric if zero is None else trick.zero[1]
    stored = jnp.ldexp(unit_scale, exponent).astype(dtype)
    offset = None
    if zero is not None:
        offset = jnp.ldexp(-zero.astype(jnp.float32), trick.unit + trick.zero[0]).astype(dtype)
    return W4Weight(layout.pack(codes), stored, offset, normaliser, group_size, dtype)


def _normalise(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(scale / r, r): r [..., N] a power of two, the largest |scale| / r of a column in [1, 2)."""
    largest = jnp.max(jnp.abs(scale), axis=-2)
    _, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1.0))
    return jnp.ldexp(scale, 1 - exponent[..., None, :]), jnp.ldexp(
        jnp.ones_like(largest), exponent - 1
    )


def operands(w: W4Weight) -> jax.Array:
    """What the kernels feed the tensor cores: `w.dtype` [..., K, N], rounded once.

    `operands(w).astype(float32) * w.normaliser[..., None, :]` is the dequantized weight.
    """
    trick = TRICKS[w.dtype]
    size = w.group_size or w.k
    codes = layout.unpack(w.fragments)
    codes = codes.reshape(*codes.shape[:-2], w.k // size, size, w.n).astype(jnp.float32)
    scale = w.scale.astype(jnp.float32)[..., None, :]
    if w.offset is None:
        zero, exponent = jnp.full_like(scale, SYMMETRIC_ZERO), trick.unit
    else:
        base = trick.unit + trick.zero[0]
        zero = jnp.ldexp(-w.offset.astype(jnp.float32), -base)[..., None, :]
        exponent = base
    # The scale carries up to 2^126: brought down before the product, not after.
    a = (codes - zero) * jnp.ldexp(scale, exponent)
    return a.reshape(w.shape).astype(w.dtype)


def dequantize(w: W4Weight) -> Float32[Array, "*B K N"]:
    """The weight as the kernels see it, float32 [..., K, N]."""
    return operands(w).astype(jnp.float32) * w.normaliser[..., None, :]
