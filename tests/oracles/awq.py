"""AWQ (Lin et al., arXiv 2306.00978) channel by channel in float64, on the tokens themselves."""

from __future__ import annotations

import numpy as np

from tests.oracles import rtn
from tests.oracles.formats import Format


def weight_magnitude(weights: list[np.ndarray], group_size: int) -> np.ndarray:
    """[K]: how large a channel's weights are beside the largest of their group, on average."""
    w = np.abs(np.hstack([np.asarray(w, np.float64) for w in weights]))
    size = len(w) if group_size == -1 else group_size
    out = np.empty(len(w))
    for k in range(len(w)):
        group = w[k // size * size : (k // size + 1) * size]
        largest = group.max(axis=0)
        out[k] = np.mean([a / b if b > 0 else 0.0 for a, b in zip(w[k], largest, strict=True)])
    return out


def scale(exponent: float, abs_mean: np.ndarray, magnitude: np.ndarray | None) -> np.ndarray:
    """s = mean|x|^a, over magnitude^(1-a) if given, times what makes max * min = 1; dead ones 1."""
    alive = abs_mean > 0
    out = np.ones(len(abs_mean))
    out[alive] = abs_mean[alive] ** exponent
    if magnitude is not None:
        out[alive] /= (magnitude[alive] + 1e-4) ** (1 - exponent)
    if alive.any():
        out[alive] /= np.sqrt(out[alive].max() * out[alive].min())
    return np.clip(out, 1e-4, 1e4)


def loss(
    x: np.ndarray, weights: list[np.ndarray], s: np.ndarray, fmt: Format, group_size: int
) -> float:
    """|| (x / s) Q(s W) - x W ||^2 over the linears."""
    total = 0.0
    for w in weights:
        w = np.asarray(w, np.float64)
        rounded = rtn.dequantize(rtn.quantize(w * s[:, None], fmt, group_size), fmt)
        total += float((((x / s) @ rounded - x @ w) ** 2).sum())
    return total


def losses(
    x: np.ndarray,
    weights: list[np.ndarray],
    fmt: Format,
    group_size: int,
    n_grid: int,
    *,
    duo: bool = True,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(losses, scales) of no scaling and of the exponents 0, 1 / n_grid, ..."""
    x = np.asarray(x, np.float64)
    abs_mean = np.abs(x).mean(axis=0)
    magnitude = weight_magnitude(weights, group_size) if duo else None
    tried = [np.ones(x.shape[1])]
    tried += [scale(i / n_grid, abs_mean, magnitude) for i in range(n_grid)]
    return np.array([loss(x, weights, s, fmt, group_size) for s in tried]), tried
