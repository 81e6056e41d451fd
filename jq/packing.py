"""Dense packing of small unsigned integers into bytes: the layout of checkpoints (version 1).

Eight consecutive codes along the packed axis become `bits` bytes, as one little-endian bit stream:
code j of the eight holds stream bits [bits*j, bits*(j+1)), the lowest first.  2, 3, 4, ... bits per
code therefore cost exactly that many; two int4 codes share a byte (the even one in the low nibble),
eight int3 codes three bytes. An axis whose size is no multiple of 8 is padded with zero codes.
8-bit codes are stored as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LAYOUT_VERSION = 1
_LANES = 8


def packed_size(size: int, bits: int) -> int:
    """Bytes along the packed axis for `size` codes."""
    return size if bits == 8 else -(-size // _LANES) * bits


def pack(codes: jax.Array, bits: int, axis: int = -2) -> jax.Array:
    """Pack uint8 codes in [0, 2**bits) along `axis`.

    Args:
      codes: uint8 [..., K, N].
      bits: 2 to 8.
      axis: the axis to pack, counted from the end.
    Returns: uint8, that axis `packed_size(K, bits)` long.
    """
    if bits == 8:
        return codes.astype(jnp.uint8)
    # The packed axis goes first, so that a lane of all groups of eight is one contiguous slice.
    x = jnp.moveaxis(codes, axis, 0).astype(jnp.uint8)
    x = jnp.pad(x, [(0, -x.shape[0] % _LANES)] + [(0, 0)] * (x.ndim - 1))
    x = x.reshape(-1, _LANES, *x.shape[1:])
    streams = [jnp.zeros_like(x[:, 0]) for _ in range(bits)]
    for lane in range(_LANES):
        byte, shift = divmod(lane * bits, 8)
        streams[byte] |= x[:, lane] << jnp.uint8(shift)
        if shift + bits > 8:
            streams[byte + 1] |= x[:, lane] >> jnp.uint8(8 - shift)
    packed = jnp.stack(streams, axis=1).reshape(-1, *x.shape[2:])
    return jnp.moveaxis(packed, 0, axis)


def unpack(packed: jax.Array, bits: int, size: int, axis: int = -2) -> jax.Array:
    """The exact inverse of `pack`: uint8 codes with `size` entries along `axis`."""
    if bits == 8:
        return packed
    # The lanes are stacked in front of the axis behind the packed one, so that packing along K (the
    # usual case) moves no data: [K/8, bits, N] -> [K/8, 8, N].
    axis = axis % packed.ndim
    shape = packed.shape
    grouped = packed.reshape(*shape[:axis], shape[axis] // bits, bits, *shape[axis + 1 :])
    streams = [jax.lax.index_in_dim(grouped, i, axis + 1, keepdims=False) for i in range(bits)]
    mask = jnp.uint8(2**bits - 1)
    lanes = []
    for lane in range(_LANES):
        byte, shift = divmod(lane * bits, 8)
        value = streams[byte] >> jnp.uint8(shift)
        if shift + bits > 8:
            value |= streams[byte + 1] << jnp.uint8(8 - shift)
        lanes.append(value & mask)
    codes = jnp.stack(lanes, axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(codes, 0, size, axis=axis)
