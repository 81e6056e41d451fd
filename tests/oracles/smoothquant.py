"""SmoothQuant (Xiao et al., arXiv 2211.10438) channel by channel in float64."""

from __future__ import annotations

import numpy as np

from tests.oracles import qmatmul, rtn
from tests.oracles.formats import format_of


def scale(alpha: float, x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """Equation 4: s_j = max|x_j|^alpha / max|w_j|^(1 - alpha); 1 where either is zero."""
    out = []
    for j in range(x.shape[1]):
        x_max = float(np.abs(x[:, j]).max())
        w_max = max(float(np.abs(w[j]).max()) for w in weights)
        dead = x_max == 0 or w_max == 0
        out.append(1.0 if dead else max(x_max**alpha / w_max ** (1 - alpha), 1e-5))
    return np.array(out)


def loss(x: np.ndarray, weights: list[np.ndarray], s: np.ndarray, spec) -> float:
    """|| Q(x / s) Q(s W) - x W ||^2 with both operands in 8 bits."""
    x = np.asarray(x, np.float64)
    w = np.hstack([np.asarray(w, np.float64) for w in weights])
    fmt = format_of(spec)
    shared = {"tensor": w.shape[1], "block": spec.group_size}.get(spec.granularity, 1)
    codes = rtn.quantize(w * s[:, None], fmt, spec.group_size, shared=shared)
    y = qmatmul.activations(x / s, spec) @ rtn.dequantize(codes, fmt)
    return float(((y - x @ w) ** 2).sum())
