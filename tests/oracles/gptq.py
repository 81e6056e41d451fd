"""GPTQ as the paper has it (Frantar et al., arXiv 2210.17323), input by input in float64.

The inverse of the damped Hessian is computed, and its Cholesky factor (section 3.3, step 3; its
rows are what eliminating one input after another, equation 3, would leave). Each input is rounded,
and equation 2 moves all inputs that are still to come.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.oracles import rtn
from tests.oracles.formats import Format, nearest_row, value_row


class Solved(NamedTuple):
    """codes, margins [K, N] in stored order; scale, zero [G, N] in stored order; the order of the
    stored rows (None: as they come); the loss sum_n e_n' H e_n with the damped H."""

    codes: np.ndarray
    margins: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    order: np.ndarray | None
    loss: float
    weight: np.ndarray


def damped(gram: np.ndarray, damp: float) -> np.ndarray:
    """H with `damp` times its mean diagonal added to the diagonal."""
    gram = np.asarray(gram, np.float64)
    return gram + damp * np.mean(np.diag(gram)) * np.eye(len(gram))


def inverse_factor(h: np.ndarray) -> np.ndarray:
    """U upper triangular with inv(H) = U' U."""
    return np.linalg.cholesky(np.linalg.inv(h)).T


def inverse_factor_by_elimination(h: np.ndarray) -> np.ndarray:
    """The same rows by equation 3: the inverse shrinks by one input after another."""
    inverse = np.linalg.inv(h)
    rows = np.zeros_like(inverse)
    for q in range(len(h)):
        rows[q] = inverse[q] / np.sqrt(inverse[q, q])
        rows[q, :q] = 0
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return rows


def processing_order(diagonal: np.ndarray, size: int, how: str) -> np.ndarray:
    """Inputs in the order of their rounding: "plain", "desc_act" or "gar"."""
    inputs = list(range(len(diagonal)))
    if how == "plain":
        return np.array(inputs)
    if how == "desc_act":
        return np.array(sorted(inputs, key=lambda i: -diagonal[i]))
    groups = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    groups.sort(key=lambda group: -max(diagonal[i] for i in group))
    return np.array([i for group in groups for i in sorted(group, key=lambda i: -diagonal[i])])


def quantize(
    w: np.ndarray,
    gram: np.ndarray,
    fmt: Format,
    group_size: int,
    *,
    damp: float = 0.01,
    how: str = "plain",
    static_groups: bool = False,
    clip: str = "none",
    shared: int = 1,
    follow: np.ndarray | None = None,
) -> Solved:
    """Quantize [K, N].

    follow: codes [K, N] in stored order that are taken instead of the nearest ones, so that a
      candidate can be judged step by step: `codes` and `margins` then say what was nearest given
      the candidate's own past.
    """
    w, gram = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    k, n = w.shape
    size = k if group_size == -1 else group_size
    h = damped(gram, damp)
    order = processing_order(np.diag(gram), size, how)
    gathered = how == "desc_act" and not static_groups and size < k
    # stored[i]: the stored row of the i-th input that is rounded; group[i]: its row of the scale.
    stored = np.arange(k) if gathered else order
    group = stored // size
    factor = inverse_factor(h[np.ix_(order, order)])
    work = w[order].copy()
    codes, margins, weight = np.empty((k, n), int), np.empty((k, n)), np.empty((k, n))
    scale, zero = np.empty((k // size, n)), np.empty((k // size, n))
    if static_groups:
        for g in range(k // size):
            some = slice(g * size, (g + 1) * size)
            scale[g], zero[g] = rtn.grids(w[some], fmt, shared, clip, gram[some, some])
    for i in range(k):
        g = group[i]
        if i % size == 0 and not static_groups:
            inputs = order[i : i + size]
            block = gram[np.ix_(inputs, inputs)]
            scale[g], zero[g] = rtn.grids(work[i : i + size], fmt, shared, clip, block)
        row = stored[i]
        codes[row], margins[row] = nearest_row(work[i], scale[g], zero[g], fmt)
        chosen = codes[row] if follow is None else follow[row]
        rounded = value_row(chosen, scale[g], zero[g], fmt)
        weight[order[i]] = rounded
        scaled = (work[i] - rounded) / factor[i, i]
        work[i:] -= np.outer(factor[i, i:], scaled)
    error = w - weight
    loss = float(np.einsum("kn,kj,jn->", error, h, error))
    return Solved(codes, margins, scale, zero, order if gathered else None, loss, weight)
