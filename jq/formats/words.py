"""Small codes in 32-bit words: how every format of other tools packs.

Codes along one axis form one little-endian bit stream, the lowest bits first, and 32 bits of it are
one int32 word; 3-bit codes cross the borders of words.  That is the stream of `jq.packing`, four of
whose bytes make a word, so most weights are converted without being unpacked.  The one exception is
AWQ, which deals eight neighbours to a word's nibbles in an order of its own.

NumPy on the host: weights pass through here once, when a file is read or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from jq import packing

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8

Axis = Literal[0, 1]

# Nibble j of an AWQ word holds column _AWQ_ORDER[j] of eight neighbours.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_INVERSE = tuple(_AWQ_ORDER.index(column) for column in range(8))


def num_words(size: int, bits: int) -> int:
    """Words along the packed axis for `size` codes."""
    return -(-size * bits // 32)


def pack(codes: UInt8[np.ndarray, "_ _"], bits: int, axis: Axis) -> Int32[np.ndarray, "_ _"]:
    """Pack codes in [0, 2**bits) along `axis`; what is left of the last word is zero.

    Args:
      codes: uint8 [R, C].
      bits: 1 to 8.
      axis: 0 or 1, the packed one.
    Returns: int32, that axis `num_words(size, bits)` long.
    """
    x = codes if axis == 0 else codes.T
    size = x.shape[0]
    if size % 32:
        x = np.pad(x, ((0, -size % 32), (0, 0)))
    lanes = x.reshape(-1, 32, x.shape[1])
    out = np.zeros((lanes.shape[0], bits, x.shape[1]), np.uint32)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        code = lanes[:, lane].astype(np.uint32)
        out[:, word] |= code << np.uint32(shift)
        if shift + bits > 32:
            out[:, word + 1] |= code >> np.uint32(32 - shift)
    packed = out.reshape(-1, x.shape[1])[: num_words(size, bits)].view(np.int32)
    return np.ascontiguousarray(packed if axis == 0 else packed.T)


def unpack(
    words: Int32[np.ndarray, "_ _"], bits: int, size: int, axis: Axis
) -> UInt8[np.ndarray, "_ _"]:
    """The inverse of `pack`: uint8 codes, `size` of them along `axis`."""
    x = np.asarray(words if axis == 0 else words.T, "<i4").view("<u4")
    groups = -(-size // 32)
    full = np.zeros((groups * bits, x.shape[1]), np.uint32)
    full[: x.shape[0]] = x
    full = full.reshape(groups, bits, x.shape[1])
    codes = np.empty((groups, 32, x.shape[1]), np.uint8)
    mask = np.uint32(2**bits - 1)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = full[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= full[:, word + 1] << np.uint32(32 - shift)
        codes[:, lane] = value & mask
    codes = codes.reshape(-1, x.shape[1])[:size]
    return codes if axis == 0 else np.ascontiguousarray(codes.T)


def to_bytes(
    words: Int32[np.ndarray, "_ _"], bits: int, size: int, axis: Axis
) -> UInt8[np.ndarray, "_ N"]:
    """Words packed along `axis` as the bytes of `jq.packing.pack(codes, bits, axis=0)`.

    Nothing is unpacked.  `axis` is the packed one of `words`; in the result it is always the first.
    """
    x = np.asarray(words if axis == 0 else words.T, "<i4")
    stream = np.ascontiguousarray(x.T).view(np.uint8)  # [N, 4 * words]
    length = packing.packed_size(size, bits)
    if stream.shape[1] < length:  # bytes come in eights of codes, words in 32 bits
        stream = np.pad(stream, ((0, 0), (0, length - stream.shape[1])))
    return np.ascontiguousarray(stream[:, :length].T)


def from_bytes(
    packed: UInt8[np.ndarray, "_ N"], bits: int, size: int, axis: Axis
) -> Int32[np.ndarray, "_ _"]:
    """The inverse of `to_bytes`: int32 words, packed along `axis`."""
    length = 4 * num_words(size, bits)
    stream = np.ascontiguousarray(packed.T)[:, :length]
    if stream.shape[1] < length:
        stream = np.pad(stream, ((0, 0), (0, length - stream.shape[1])))
    x = np.ascontiguousarray(stream).view("<i4").astype(np.int32, copy=False)
    return np.ascontiguousarray(x.T) if axis == 0 else x


def pack_awq(codes: UInt8[np.ndarray, "_ _"]) -> Int32[np.ndarray, "_ _"]:
    """4-bit codes [R, C] along the second axis in AWQ's order: int32 [R, C/8]; 8 divides C."""
    dealt = codes.reshape(codes.shape[0], -1, 8)[:, :, list(_AWQ_ORDER)]
    return pack(dealt.reshape(codes.shape), 4, axis=1)


def unpack_awq(words: Int32[np.ndarray, "_ _"]) -> UInt8[np.ndarray, "_ _"]:
    """The inverse of `pack_awq`: uint8 [R, 8 * words]."""
    dealt = unpack(words, 4, 8 * words.shape[1], axis=1)
    codes = dealt.reshape(words.shape[0], -1, 8)[:, :, list(_AWQ_INVERSE)]
    return codes.reshape(dealt.shape)
