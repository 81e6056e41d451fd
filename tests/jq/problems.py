"""Random problems for the methods, and how their codes are compared with an oracle's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

# Nearer than this (in steps of the grid) to a rounding boundary, float32 and float64 may disagree.
TIE = 1e-4


def weights(k: int, n: int, seed: int = 0) -> np.ndarray:
    """float32 [k, n], outputs of different size and offset."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.5, 2.0, (1, n))
    return ((rng.standard_normal((k, n)) + rng.normal(0, 0.3, (1, n))) * size).astype(np.float32)


def inputs(k: int, tokens: int, seed: int = 1) -> np.ndarray:
    """float32 [tokens, k]: correlated, channels of different size, a few outliers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k)) @ (np.eye(k) + 0.6 * rng.standard_normal((k, k)) / k**0.5)
    return (x * rng.lognormal(0, 0.7, k)).astype(np.float32)


def gram(k: int, tokens: int | None = None, seed: int = 1) -> np.ndarray:
    """float32 [k, k], sum of x x' over `tokens` (default 4 k) inputs."""
    x = inputs(k, 4 * k if tokens is None else tokens, seed).astype(np.float64)
    return (x.T @ x).astype(np.float32)


def code_bytes(codes) -> np.ndarray:
    """Codes as integers; float8 as bytes, with one zero instead of two."""
    codes = np.asarray(codes)
    if codes.dtype != jnp.float8_e4m3fn:
        return codes.astype(int)
    codes = codes.view(np.uint8).astype(int)
    return np.where(codes == 0x80, 0, codes)


def count_ties(codes, oracle_codes: np.ndarray, margins: np.ndarray, most: int = 0) -> int:
    """How many codes differ from the oracle's.

    Fails where one differs without being a tie, and when there are more than `most`.
    """
    different = code_bytes(codes) != oracle_codes
    worst = margins[different].max(initial=0)
    assert worst < TIE, f"a code differs {worst:.3g} steps away from the rounding boundary"
    assert different.sum() <= most, f"{different.sum()} ties; at most {most} expected"
    return int(different.sum())


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
