"""What `jaxq doctor` tries: every kind of product on a small weight, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.kernels.activations import plan_of, quantize_input
from jq.kernels.choice import REFERENCE, explain
from jq.matmul import qmatmul
from jq.methods.rtn import rtn_quantize
from jq.prepare import prepare
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.spec import FP8, QuantSpec, w4a16, w8a8
from jq.support import Product, product_of

K, N = 512, 256
ROWS = (1, 16, 300)
# Norm over norm: sums in float32 and one rounding to bfloat16, and float8's sums on tensor cores.
LARGEST_ERROR = 5e-3

FORMATS = {
    "int4, groups of 128": w4a16(),
    "int4, groups of 64, zero points": w4a16(64, symmetric=False),
    "int8, per output": QuantSpec("int8", -1, scale_dtype="float32"),
    "int8 x int8, per token": w8a8(),
    "fp8 x fp8, per token": w8a8(FP8),
    "fp8 x fp8, blocks of 128": w8a8(FP8, activation="group", weight="block"),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One product.

    Attributes:
        name, product: what was multiplied, and its column of the support matrix.
        rows: of x.
        kernel: what ran: "w4a16" or "w8a8", or "reference" for XLA's.
        why: why it was that one.
        error: relative, against float64; None where it did not run.
        failure: what went wrong; None where nothing did.
    """

    name: str
    product: Product
    rows: int
    kernel: str
    why: str
    error: float | None
    failure: str | None

    @property
    def passed(self) -> bool:
        return self.failure is None


def trials() -> Iterator[Trial]:
    """Multiply on JAX's default device, one product after the other."""
    for name, spec in FORMATS.items():
        w = _weight(spec)
        for rows in ROWS:
            yield _trial(name, w, rows)


def _trial(name: str, w: QTensor, rows: int) -> Trial:
    choice = explain(w, rows=rows)
    trial = Trial(name, product_of(w.spec), rows, choice.kernel, choice.reason, None, None)
    try:
        error = _error(w, rows, choice.kernel != REFERENCE)
    except Exception as problem:  # whatever a compiler or a driver raises is the finding
        text = " ".join(str(problem).split())
        return dataclasses.replace(trial, failure=f"{type(problem).__name__}: {text[:200]}")
    failure = None
    if not error <= LARGEST_ERROR:
        failure = f"the error {error:.2g} is larger than {LARGEST_ERROR:g}"
    return dataclasses.replace(trial, error=error, failure=failure)


def _error(w: QTensor, rows: int, kernel: bool) -> float:
    ready: Any = prepare(w) if kernel else w
    assert isinstance(ready, PreparedTensor) == kernel
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, w.k)), jnp.bfloat16)
    y, seen = jax.jit(qmatmul)(x, ready), jax.jit(_seen)(x, w)
    exact = np.asarray(seen, np.float64) @ np.asarray(w.dequantize(), np.float64)
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


def _seen(x: jax.Array, w: QTensor) -> jax.Array:
    """x as the product sees it, float32; the portable weight's is quantized by XLA."""
    if w.spec.activation is None:
        return x.astype(jnp.float32)
    quantized = quantize_input(x, plan_of(w), w.input_scale)
    scale = quantized.scale
    wide = quantized.codes.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
    return wide.reshape(x.shape)


def _weight(spec: QuantSpec) -> QTensor:
    w = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32) / 16
    return jax.jit(lambda w: rtn_quantize(w, spec).to_qtensor(spec))(w)
