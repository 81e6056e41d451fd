"""Round to nearest, set by set: a set is all weights that share one scale."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.oracles import clip
from tests.oracles.formats import Format, grid, nearest_row, value_row


class Rounded(NamedTuple):
    """codes [K, N]; margins [K, N] (see `formats.nearest`); scale, zero [G, N]."""

    codes: np.ndarray
    margins: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def range_of(w: np.ndarray, fmt: Format, kind: str, gram: np.ndarray | None) -> tuple[float, float]:
    """(lo, hi) of weights [g, outputs] that share a scale; ends that tie keep the wider range."""
    lo, hi = min(w.min(), 0.0), max(w.max(), 0.0)
    if fmt.symmetric:
        hi = max(-lo, hi)
        lo = -hi
    if kind == "none":
        return lo, hi
    loss = clip.squared if kind == "mse" else clip.output(gram)
    factor = clip.FACTORS[int(np.argmin(clip.losses(w, lo, hi, fmt, loss)))]
    return factor * lo, factor * hi


def grids(
    w: np.ndarray, fmt: Format, shared: int = 1, kind: str = "none", gram: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero), each [N], of one group [g, N] in which `shared` outputs share a scale."""
    n = w.shape[1]
    scale, zero = np.empty(n), np.empty(n)
    for first in range(0, n, shared):
        some = slice(first, first + shared)
        scale[some], zero[some] = grid(*range_of(w[:, some], fmt, kind, gram), fmt)
    return scale, zero


def quantize(
    w: np.ndarray,
    fmt: Format,
    group_size: int,
    *,
    shared: int = 1,
    clip: str = "none",
    gram: np.ndarray | None = None,
) -> Rounded:
    """Quantize [K, N]; group_size -1 is all of K; `shared` outputs have one scale."""
    w = np.asarray(w, np.float64)
    k = w.shape[0]
    size = k if group_size == -1 else group_size
    codes, margins = np.empty(w.shape, int), np.empty(w.shape)
    scales, zeros = [], []
    for first in range(0, k, size):
        some = slice(first, first + size)
        block = None if gram is None else np.asarray(gram, np.float64)[some, some]
        scale, zero = grids(w[some], fmt, shared, clip, block)
        for row in range(first, first + size):
            codes[row], margins[row] = nearest_row(w[row], scale, zero, fmt)
        scales.append(scale)
        zeros.append(zero)
    return Rounded(codes, margins, np.array(scales), np.array(zeros))


def dequantize(rounded: Rounded, fmt: Format) -> np.ndarray:
    """float64 [K, N]."""
    size = len(rounded.codes) // len(rounded.scale)
    rows = [
        value_row(codes, rounded.scale[k // size], rounded.zero[k // size], fmt)
        for k, codes in enumerate(rounded.codes)
    ]
    return np.array(rows)
