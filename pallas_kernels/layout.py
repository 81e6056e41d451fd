"""The packed order of int4 weights, "fragments" version 1: what the tensor cores' registers hold.

A weight [K, N] is cut into tiles of 64 x 64.  A tile is four 32-bit words per thread of a
warpgroup (128 threads): word i of a thread holds its eight codes of the i-th 16 inputs, so that one
contiguous copy and one 128-bit load per thread feed four wgmma (or mma.m16n8k16) instructions
without moving a value between threads.  Within a word the codes of nibbles j and j + 4 are the two
neighbouring inputs of register j of the A operand.

In formulas, with the tile's column n = 16 warp + 8 h + g and row k = 16 step + 8 kh + 2 t + e
(warp, step, t in 0..3; g in 0..7; h, kh, e in 0..1): thread 4 g + t of the warp holds the code in
nibble 4 e + 2 kh + h of word `step`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, UInt8

LAYOUT_VERSION = 1
TILE = 64
_WORDS = (4, 128)  # warps x (lanes * words) of a tile


def pack(codes: UInt8[Array, "*B K N"]) -> Int32[Array, "*B N/64 K/64 4 128"]:
    """int4 codes into fragments.

    Args:
      codes: uint8 [..., K, N] in 0..15; K and N multiples of 64.
    Returns: int32 [..., N/64, K/64, 4, 128].  Tiles are contiguous, so a shard of the weight along
      K or N that is cut at multiples of 64 is a shard of the fragments.
    Raises: ValueError when K or N is no multiple of 64.
    """
    *lead, k, n = codes.shape
    if k % TILE or n % TILE:
        raise ValueError(
            f"codes are {codes.shape}, but K and N have to be multiples of {TILE} to be packed "
            "into fragments: pad them, or keep the portable layout"
        )
    b = len(lead)
    x = codes.reshape(*lead, k // TILE, 4, 2, 4, 2, n // TILE, 4, 2, 8)
    # axes: kb step kh t e, nb warp h g -> nb kb warp g t step, e kh h
    order = (5, 0, 6, 8, 3, 1, 4, 2, 7)
    x = x.transpose(*range(b), *(b + axis for axis in order))
    x = x.reshape(*lead, n // TILE, k // TILE, *_WORDS, 8)
    shifts = jnp.arange(0, 32, 4, dtype=jnp.uint32).reshape((1,) * (x.ndim - 1) + (8,))
    # Nibbles do not overlap: their sum is their union.
    words = jnp.sum((x & jnp.uint8(15)).astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)


def unpack(fragments: Int32[Array, "*B Nb Kb 4 128"]) -> UInt8[Array, "*B K N"]:
    """The exact inverse of `pack`.

    Args:
      fragments: int32 [..., N/64, K/64, 4, 128].
    Returns: uint8 [..., K, N].
    """
    *lead, nb, kb, _, _ = fragments.shape
    b = len(lead)
    words = lax.bitcast_convert_type(fragments, jnp.uint32)[..., None]
    shifts = jnp.arange(0, 32, 4, dtype=jnp.uint32).reshape((1,) * (words.ndim - 1) + (8,))
    x = ((words >> shifts) & jnp.uint32(15)).astype(jnp.uint8)
    x = x.reshape(*lead, nb, kb, 4, 8, 4, 4, 2, 2, 2)
    # axes: nb kb warp g t step e kh h -> kb step kh t e, nb warp h g
    order = (1, 5, 7, 4, 6, 0, 2, 8, 3)
    x = x.transpose(*range(b), *(b + axis for axis in order))
    return x.reshape(*lead, kb * TILE, nb * TILE)
