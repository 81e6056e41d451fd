"""Bit packing with Python integers: one little-endian bit stream along a vector."""

from __future__ import annotations

import numpy as np


def pack_vector(codes: list[int], bits: int) -> list[int]:
    """Bytes of codes laid end to end, the lowest bits first; padded to eight codes."""
    if bits == 8:
        return codes
    padded = codes + [0] * (-len(codes) % 8)
    stream = sum(code << (bits * position) for position, code in enumerate(padded))
    return list(stream.to_bytes(len(padded) * bits // 8, "little"))


def unpack_vector(packed: list[int], bits: int, size: int) -> list[int]:
    """The first `size` codes of such a stream."""
    stream = int.from_bytes(bytes(packed), "little")
    return [(stream >> (bits * position)) & (2**bits - 1) for position in range(size)]


def pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """`pack_vector` along an axis."""
    packed = np.apply_along_axis(lambda v: pack_vector(v.tolist(), bits), axis, codes.astype(int))
    return packed.astype(np.uint8)


def unpack(packed: np.ndarray, bits: int, size: int, axis: int) -> np.ndarray:
    """`unpack_vector` along an axis."""
    return np.apply_along_axis(lambda v: unpack_vector(v.tolist(), bits, size), axis, packed)
