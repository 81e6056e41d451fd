"""Quantized weights of every kind: what products, pytrees and kernels are tested on."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jq.matmul import qmatmul
from jq.methods.rtn import rtn_quantize
from jq.qtensor import QTensor
from jq.spec import FP8, ActivationSpec, QuantSpec
from tests.jq import problems

INT8, FLOAT8 = ActivationSpec(), ActivationSpec(FP8)

WEIGHT_ONLY = {
    **{f"int{b} g32": QuantSpec(f"int{b}", 32) for b in range(2, 9)},
    **{f"int{b} g32 zero": QuantSpec(f"int{b}", 32, False) for b in range(2, 9)},
    "int4 g16": QuantSpec("int4", 16),
    "int4 g64 fp16": QuantSpec("int4", 64, scale_dtype="float16"),
    "int4 channel": QuantSpec("int4", -1),
    "int3 channel zero": QuantSpec("int3", -1, False),
    "int8 channel": QuantSpec("int8", -1, scale_dtype="float32"),
    "int8 tensor": QuantSpec("int8", granularity="tensor"),
    "fp8 g32": QuantSpec(FP8, 32),
    "fp8 channel": QuantSpec(FP8, -1),
    "fp8 tensor": QuantSpec(FP8, granularity="tensor"),
    "fp8 block": QuantSpec(FP8, 16, granularity="block"),
}


def _eight_bit(dtype: str, activation: ActivationSpec, weight: str = "channel") -> QuantSpec:
    return QuantSpec(dtype, 16 if weight == "block" else -1, True, weight, "float32", activation)


EIGHT_BIT = {
    f"{name} {granularity}{' static' * static} / {weight}": _eight_bit(
        dtype, ActivationSpec(dtype, granularity, static), weight
    )
    for name, dtype in (("int8", "int8"), ("fp8", FP8))
    for granularity, static in (("token", False), ("tensor", False), ("tensor", True))
    for weight in ("channel", "tensor")
} | {"fp8 group / block": _eight_bit(FP8, ActivationSpec(FP8, "group"), "block")}

ALL = WEIGHT_ONLY | EIGHT_BIT
# One of each storage kind, for what does not depend on the numbers.
FEW = ("int4 g32", "int3 g32 zero", "fp8 block", "int8 tensor static / channel")


@functools.partial(jax.jit, static_argnums=2)
def _pack(solution, input_scale, spec):
    return solution.to_qtensor(spec, input_scale=input_scale)


# Compiled whole: operation by operation, tests would spend their time compiling each of them.
dequantize = jax.jit(lambda w: w.dequantize())
multiply = jax.jit(qmatmul)


@functools.cache
def weight(name: str, k: int = 64, n: int = 48, *, act_order: bool = False) -> QTensor:
    """A random weight [k, n] of the kind `name`, rounded to nearest."""
    spec = ALL[name]
    w = problems.weights(k, n, len(name))
    order = None
    if act_order:
        order = jnp.asarray(np.random.default_rng(1).permutation(k), jnp.int32)
        w = w[np.asarray(order)]
    static = spec.activation is not None and spec.activation.static
    # Smaller than the largest activation: some are clipped.
    scale = jnp.float32(2.5 / (448 if spec.is_float else 127)) if static else None
    return _pack(rtn_quantize(w, spec)._replace(order=order), scale, spec)


@functools.cache
def activations(tokens: int = 5, k: int = 64) -> np.ndarray:
    """float32 [tokens, k]; one row is zero and one has an outlier."""
    x = np.random.default_rng(tokens).standard_normal((tokens, k)).astype(np.float32)
    if tokens > 2:
        x[1] = 0
        x[2, 3] = 40
    return x
