"""The product with a quantized weight, from the stored bytes, in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.oracles import packing
from tests.oracles.formats import FP8_MAX, Format, fp8_value, nearest

_FP8 = np.array([fp8_value(code) for code in range(256)])


def codes_of(w) -> np.ndarray:
    """Codes [K, N] as stored: relative to the zero of a symmetric grid; float8 as numbers."""
    stored = np.asarray(w.codes)
    if w.spec.dtype == "float8_e4m3fn":
        return _FP8[stored.view(np.uint8)]
    if stored.dtype == np.int8:
        return stored.astype(np.float64)
    bits = int(w.spec.dtype.removeprefix("int"))
    codes = packing.unpack(stored, bits, w.k, 0).astype(np.float64)
    return codes - 2 ** (bits - 1) if w.zero_point is None else codes


def stored_weight(w) -> np.ndarray:
    """The weight [K, N] of a QTensor with rows as they are stored, element by element."""
    codes = codes_of(w)
    scale = np.asarray(w.scale).astype(np.float64)
    zero = np.zeros(scale.shape)
    if w.zero_point is not None:
        bits = int(w.spec.dtype.removeprefix("int"))
        zero = packing.unpack(np.asarray(w.zero_point), bits, scale.shape[1], 1)
    out = np.empty((w.k, w.n))
    for row in range(w.k):
        for column in range(w.n):
            at = row * scale.shape[0] // w.k, column * scale.shape[1] // w.n
            out[row, column] = (codes[row, column] - zero[at]) * scale[at]
    return out


def weight(w) -> np.ndarray:
    """The weight [K, N] of a QTensor with rows in the inputs' order."""
    out = stored_weight(w)
    if w.order is None:
        return out
    restored = np.empty_like(out)
    restored[np.asarray(w.order)] = out
    return restored


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values rounded to what a narrower float keeps."""
    return np.asarray(x, np.float64).astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float64)


def weight_only(x: np.ndarray, w, dtype: str = "float32") -> np.ndarray:
    """x @ W with W rounded to the dtype of x."""
    return np.asarray(x, np.float64) @ round_to(weight(w), dtype)


def quantize_activations(x: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    """The numbers that the 8-bit codes of a vector stand for, before the scale."""
    if dtype == "int8":
        return np.clip(np.round(x / scale), -127, 127)
    return _FP8[np.array([nearest(v, scale, 0.0, Format(None))[0] for v in x], int)]


def activation_scale(x: np.ndarray, dtype: str) -> float:
    """The scale at which the largest of x is the largest code."""
    return float(np.abs(x).max()) / (127 if dtype == "int8" else FP8_MAX) or 1.0


def activations(x: np.ndarray, spec, input_scale: float | None = None) -> np.ndarray:
    """x [T, K] after its round trip through 8 bits."""
    act = spec.activation
    x = np.asarray(x, np.float64)
    size = spec.group_size if act.granularity == "group" else x.shape[1]
    out = np.empty_like(x)
    whole = activation_scale(x, act.dtype)
    for token in range(len(x)):
        for first in range(0, x.shape[1], size):
            part = x[token, first : first + size]
            scale = activation_scale(part, act.dtype)
            if act.granularity == "tensor":
                scale = whole
            if input_scale is not None:
                scale = input_scale
            rounded = quantize_activations(part, scale, act.dtype)
            out[token, first : first + size] = rounded * scale
    return out


def qmatmul(x: np.ndarray, w, dtype: str = "float32") -> np.ndarray:
    """x [T, K] times a QTensor, as the format wants it: [T, N]."""
    if w.spec.activation is None:
        return weight_only(x, w, dtype)
    static = None if w.input_scale is None else float(np.asarray(w.input_scale))
    gathered = x if w.order is None else np.asarray(x)[:, np.asarray(w.order)]
    return activations(gathered, w.spec, static) @ stored_weight(w)
