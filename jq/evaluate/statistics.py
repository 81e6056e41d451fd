"""From numbers per window to estimates with standard errors.  NumPy float64.

Windows of equal length are taken as independent draws of text from the population they come from
(neighbouring windows of one article are not quite independent; the errors are a little small then).
With a single window a standard error is unknown: NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jq.errors import CalibrationError

if TYPE_CHECKING:
    from jaxtyping import Float64


class Estimate(NamedTuple):
    """A value and its standard error, in the same unit."""

    value: float
    stderr: float


def mean_estimate(values: Float64[np.ndarray, "n"]) -> Estimate:
    """Mean over windows; stderr = s / sqrt(n), s the sample standard deviation (n - 1)."""
    n = len(values)
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(np.mean(values)), stderr)


def perplexity(window_nll: Float64[np.ndarray, "n"]) -> Estimate:
    """Perplexity exp(m) of mean negative log-likelihoods per window, in nats per token.

    m is the mean over windows, which is the mean over tokens as all windows score equally many.
    The standard error is the delta method's: d exp(m) / dm = exp(m), so
    stderr = exp(m) * s / sqrt(n), with s the sample standard deviation (n - 1) of the windows'
    means.
    """
    m, stderr = mean_estimate(window_nll)
    value = _exp(m)
    return Estimate(value, value * stderr)


def paired_difference(a: Float64[np.ndarray, "n"], b: Float64[np.ndarray, "m"]) -> Estimate:
    """Mean of a - b over the same windows.

    stderr is that of the n differences, so what the windows have in common (an easy text, a hard
    one) cancels; it is far smaller than the errors of the two means suggest.

    Raises: CalibrationError when the two have not equally many windows.
    """
    _require_pairs(a, b)
    return mean_estimate(a - b)


def perplexity_difference(
    nll_a: Float64[np.ndarray, "n"], nll_b: Float64[np.ndarray, "m"]
) -> Estimate:
    """exp(mean a) - exp(mean b) over the same windows, in perplexity.

    The standard error is the delta method's for pairs: that of the mean of
    exp(mean a) * a_i - exp(mean b) * b_i.

    Raises: CalibrationError when the two have not equally many windows.
    """
    _require_pairs(nll_a, nll_b)
    a, b = _exp(float(np.mean(nll_a))), _exp(float(np.mean(nll_b)))
    if math.isinf(a) or math.isinf(b):
        return Estimate(a - b, math.nan)
    return Estimate(a - b, mean_estimate(a * nll_a - b * nll_b).stderr)


def _require_pairs(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise CalibrationError(
            f"{len(a)} and {len(b)} windows make no pairs; evaluate both on the same tokens"
        )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:  # a model that is broken, but whose logits are finite
        return math.inf
