"""The clip search: every shrink factor tried, for one set of weights that share a scale."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.oracles.formats import Format, grid, nearest, value

FACTORS = [1 - 0.5 * step / 20 for step in range(20)]


def errors(w: np.ndarray, lo: float, hi: float, fmt: Format) -> np.ndarray:
    """w minus its rounding on the grid of [lo, hi], any shape."""
    scale, zero = grid(lo, hi, fmt)
    rounded = [value(nearest(x, scale, zero, fmt)[0], scale, zero, fmt) for x in w.ravel()]
    return w - np.array(rounded).reshape(w.shape)


def losses(
    w: np.ndarray, lo: float, hi: float, fmt: Format, loss: Callable[[np.ndarray], float]
) -> np.ndarray:
    """Loss of each of FACTORS for weights [g, outputs that share the scale]."""
    return np.array([loss(errors(w, f * lo, f * hi, fmt)) for f in FACTORS])


def squared(error: np.ndarray) -> float:
    """Sum of squares."""
    return float((error**2).sum())


def output(gram: np.ndarray) -> Callable[[np.ndarray], float]:
    """Sum over outputs of e' H e, with H the Gram matrix [g, g] of the inputs of these weights."""
    return lambda error: float(sum(e @ gram @ e for e in error.T))
