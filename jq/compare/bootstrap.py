"""Differences of two models on the same windows, with intervals from a paired bootstrap.

Windows are drawn with replacement, the same ones for both models (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 8 and 13: percentile intervals). NumPy float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jq.errors import CalibrationError

if TYPE_CHECKING:
    from jaxtyping import Float64

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 2**22  # counts in memory


class Interval(NamedTuple):
    """An estimate, and the ends of its interval of confidence `LEVEL`; NaN where n is 1."""

    value: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        """Whether zero cannot be ruled out."""
        return not (self.low > 0 or self.high < 0)


def perplexity_interval(
    nll: Float64[np.ndarray, "n"], base: Float64[np.ndarray, "m"], *, seed: int = 0
) -> Interval:
    """exp(mean nll) - exp(mean base) over the same windows.

    Args:
        nll, base: mean negative log-likelihoods per window, nats per token.
        seed: of the resampling.
    Raises: CalibrationError when they are not equally many.
    """
    means = np.exp(_resampled_means(_pairs(nll, base), seed))
    return _interval(math.exp(nll.mean()) - math.exp(base.mean()), means[:, 0] - means[:, 1])


def mean_interval(
    a: Float64[np.ndarray, "n"], b: Float64[np.ndarray, "m"], *, seed: int = 0
) -> Interval:
    """mean a - mean b over the same windows or items; otherwise as `perplexity_interval`."""
    means = _resampled_means(_pairs(a, b), seed)
    return _interval(float(a.mean() - b.mean()), means[:, 0] - means[:, 1])


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape:
        raise CalibrationError(
            f"{len(a)} and {len(b)} measurements make no pairs; measure both on the same ones"
        )
    return np.stack([a, b], axis=1)


def _resampled_means(values: Float64[np.ndarray, "n m"], seed: int) -> Float64[np.ndarray, "R m"]:
    """Means of `RESAMPLES` draws of n rows with replacement."""
    n = len(values)
    rng = np.random.default_rng(seed)
    most = max(1, _AT_ONCE // n)
    parts = []
    for start in range(0, RESAMPLES, most):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(most, RESAMPLES - start))
        parts.append(counts @ values / n)
    return np.concatenate(parts)


def _interval(value: float, resampled: Float64[np.ndarray, "R"]) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    # Of one window all draws are the same, and say nothing.
    if low == high != 0:
        return Interval(value, math.nan, math.nan)
    return Interval(value, float(low), float(high))
