"""Linears as other tools store them, one number at a time: GPTQ, AWQ and compressed-tensors.

A `Linear` is the truth; `gptq`, `awq`, `packed` and `plain` write it down with Python integers, the
`read_*` functions go the other way, from the stored arrays to weights [K, N] in float64.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from tests.oracles.formats import fp8_value

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP8 = np.array([fp8_value(code) for code in range(256)])


@dataclasses.dataclass(frozen=True)
class Linear:
    """codes [K, N] and zeros [G, N] are unsigned, scales [G, N]; groups [K] is the input's row."""

    bits: int
    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """float64 [K, N]."""
        k, n = self.codes.shape
        w = np.zeros((k, n))
        for row in range(k):
            g = self.groups[row]
            for column in range(n):
                q, z = int(self.codes[row, column]), int(self.zeros[g, column])
                w[row, column] = (q - z) * float(self.scales[g, column])
        return w


def random_linear(
    bits: int,
    k: int,
    n: int,
    group_size: int,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    dtype: str = "float16",
    seed: int = 0,
) -> Linear:
    """Codes and zeros of all values, the extremes among them."""
    rng = np.random.default_rng([seed, bits, k, n])
    g = k if group_size == -1 else group_size
    groups = np.arange(k) // g
    zeros = rng.integers(0, 2**bits, (k // g, n))
    zeros[0, :2] = 0, 2**bits - 1
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = rng.uniform(0.01, 0.1, (k // g, n)).astype(getattr(ml_dtypes, dtype, dtype))
    codes = rng.integers(0, 2**bits, (k, n))
    return Linear(bits, codes, zeros, scales, rng.permutation(groups) if act_order else groups)


def put(codes: list[int], bits: int) -> list[int]:
    """int32 words of codes laid end to end, the lowest bits first."""
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def get(words: list[int], bits: int, size: int) -> list[int]:
    """The first `size` codes of such words."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(size)]


def pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """`put` along an axis."""
    return np.apply_along_axis(lambda v: put(v.tolist(), bits), axis, codes).astype(np.int32)


def unpack(words: np.ndarray, bits: int, size: int, axis: int) -> np.ndarray:
    """`get` along an axis."""
    return np.apply_along_axis(lambda v: get(v.tolist(), bits, size), axis, words)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """Nibble j of word c is column 8 c + AWQ_ORDER[j]."""
    dealt = np.zeros_like(codes)
    for column in range(codes.shape[1]):
        word, nibble = divmod(column, 8)
        dealt[:, column] = codes[:, 8 * word + AWQ_ORDER[nibble]]
    return pack(dealt, 4, 1)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """The other way."""
    dealt = unpack(words, 4, 8 * words.shape[1], 1)
    codes = np.zeros_like(dealt)
    for column in range(codes.shape[1]):
        word, nibble = divmod(column, 8)
        codes[:, 8 * word + AWQ_ORDER[nibble]] = dealt[:, column]
    return codes


def gptq(linear: Linear, version: int = 1) -> dict[str, np.ndarray]:
    """v1 stores zero - 1, modulo 2**bits."""
    stored = (linear.zeros - 1) % 2**linear.bits if version == 1 else linear.zeros
    return {
        "qweight": pack(linear.codes, linear.bits, 0),
        "qzeros": pack(stored, linear.bits, 1),
        "scales": linear.scales,
        "g_idx": linear.groups.astype(np.int32),
    }


def read_gptq(tensors: dict[str, np.ndarray], bits: int, version: int = 1) -> np.ndarray:
    """The weight of such tensors."""
    k, n = tensors["g_idx"].shape[0], tensors["scales"].shape[1]
    zeros = unpack(tensors["qzeros"], bits, n, 1)
    zeros = (zeros + 1) % 2**bits if version == 1 else zeros
    codes = unpack(tensors["qweight"], bits, k, 0)
    return Linear(bits, codes, zeros, tensors["scales"], tensors["g_idx"]).weight


def awq(linear: Linear) -> dict[str, np.ndarray]:
    """Zeros as they are."""
    return {
        "qweight": pack_awq(linear.codes),
        "qzeros": pack_awq(linear.zeros),
        "scales": linear.scales,
    }


def packed(linear: Linear, *, symmetric: bool, act_order: bool) -> dict[str, np.ndarray]:
    """pack-quantized: what is stored is the unsigned code."""
    k, n = linear.codes.shape
    tensors = {
        "weight_packed": pack(linear.codes.T, linear.bits, 1),
        "weight_scale": linear.scales.T,
        "weight_shape": np.array([n, k], np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(linear.zeros.T, linear.bits, 0)
    if act_order:
        tensors["weight_g_idx"] = linear.groups.astype(np.int32)
    return tensors


def read_packed(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """The weight of such tensors."""
    n, k = (int(size) for size in tensors["weight_shape"])
    scales = tensors["weight_scale"].T
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in tensors:
        zeros = unpack(tensors["weight_zero_point"], bits, n, 0).T
    groups = tensors.get("weight_g_idx", np.arange(k) // (k // scales.shape[0]))
    codes = unpack(tensors["weight_packed"], bits, k, 1).T
    return Linear(bits, codes, zeros, scales, groups).weight


def plain(linear: Linear, *, symmetric: bool) -> dict[str, np.ndarray]:
    """int-quantized and naive-quantized: signed bytes."""
    offset = 2 ** (linear.bits - 1)
    tensors = {
        "weight": (linear.codes - offset).astype(np.int8).T,
        "weight_scale": linear.scales.T,
    }
    if not symmetric:
        tensors["weight_zero_point"] = (linear.zeros - offset).astype(np.int8).T
    return tensors


def float8_weight(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64 [K, N] of float8 bytes [N, K] and scales [N | N/b | 1, K/b | 1]."""
    n, k = weight.shape
    w = np.zeros((k, n))
    codes = weight.view(np.uint8)
    for row in range(n):
        for column in range(k):
            s = scale[row * scale.shape[0] // n, column * scale.shape[1] // k]
            w[column, row] = FP8[codes[row, column]] * float(s)
    return w
