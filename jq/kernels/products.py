"""Products with quantized weights, differentiable in x."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jq.kernels.activations import QuantizedActivations, target
from jq.kernels.operations import eight_bit_product, int4_product, over_rows
from jq.pallas_kernels import reference, weight, weight8
from jq.pallas_kernels.w4a16 import supported, w4a16_reference
from jq.pallas_kernels.w8a8 import OUTPUTS, supported8, w8a8_reference
from jq.pallas_kernels.weight import W4Weight
from jq.pallas_kernels.weight8 import W8Weight
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.support import Capability

plain = reference.weight_only


def weight_only(x: jax.Array, w: QTensor | PreparedTensor) -> jax.Array:
    """x [..., K] @ w, rows in stored order, for a weight with 16-bit activations."""
    if isinstance(w, QTensor):
        return plain(x, w.dequantize_stored(x.dtype))
    return _prepared(x, w.weight, target(w))


def eight_bit(x: QuantizedActivations, w: QTensor | PreparedTensor) -> jax.Array:
    """x [..., K] @ w, for a weight with 8-bit activations."""
    if isinstance(w, QTensor):
        return _portable8(x.x, x.codes, x.scale, w)
    scale = x.scale
    if w.spec.activation is not None and w.spec.activation.granularity == "tensor":
        scale = jnp.broadcast_to(scale.reshape(()), (*x.shape[:-1], 1))
    return _prepared8(x.x, x.codes, scale, w.weight, target(w))


# Prepared weights.  Functions of their own in the program of a model, so that linears of equal
# shape are lowered once.


@functools.partial(jax.jit, static_argnames="capability")
def _prepared(x: jax.Array, w: W4Weight, capability: Capability | None) -> jax.Array:
    rows = over_rows(functools.partial(_int4, capability))

    @jax.custom_vjp
    def product(x, w):
        return rows(x, w)

    def backward(w, dy):
        return plain(dy, weight.dequantize(w).T), jax.tree.map(_zero_tangent, w)

    product.defvjp(lambda x, w: (rows(x, w), w), backward)
    return product(x, w)


def _int4(capability: Capability | None, x: jax.Array, w: W4Weight) -> jax.Array:
    rows = math.prod(x.shape[:-1])
    if x.dtype == jnp.dtype(w.dtype):
        if capability is not None and supported(w, rows, capability) is None:
            return int4_product(x, w, capability=capability)
        return w4a16_reference(x, w)
    # Rounded to the weight's own dtype whatever that of x.
    return plain(x, weight.dequantize(w))


@functools.partial(jax.jit, static_argnames="capability")
def _prepared8(
    x: jax.Array, codes: jax.Array, scale: jax.Array, w: W8Weight, capability: Capability | None
) -> jax.Array:
    rows = over_rows(functools.partial(_int8_or_fp8, capability, x.dtype.name))

    @jax.custom_vjp
    def product(x, codes, scale, w):
        return rows((codes, scale), w)

    def backward(saved, dy):
        return plain(dy, weight8.dequantize(saved[-1]).T), *_constants(saved)

    product.defvjp(
        lambda _, codes, scale, w: (rows((codes, scale), w), (codes, scale, w)), backward
    )
    return product(x, codes, scale, w)


def _int8_or_fp8(capability: Capability | None, dtype: str, rows, w: W8Weight) -> jax.Array:
    codes, scale = rows
    count = math.prod(codes.shape[:-1])
    served = capability is not None and supported8(w, count, capability) is None
    if served and dtype in OUTPUTS:
        return eight_bit_product(codes, scale, w, dtype=dtype, capability=capability)
    return w8a8_reference(codes, scale, w, out_dtype=dtype)


# The portable layout


@jax.custom_vjp
def _portable8(x: jax.Array, codes: jax.Array, scale: jax.Array, w: QTensor) -> jax.Array:
    w_scale = w.scale.astype(jnp.float32)
    if w.spec.granularity != "block":
        return reference.scaled_matmul(codes, scale, w.codes, w_scale, x.dtype)
    blocks = codes.reshape(*codes.shape[:-1], w_scale.shape[0], -1)
    return reference.block_scaled_matmul(blocks, scale[..., None], w.codes, w_scale, x.dtype)


def _portable8_backward(saved, dy):
    w = saved[-1]
    return plain(dy, w.dequantize_stored(dy.dtype).T), *_constants(saved)


_portable8.defvjp(lambda x, *rest: (_portable8(x, *rest), rest), _portable8_backward)


def _constants(tree):
    return jax.tree.map(_zero_tangent, tree)


def _zero_tangent(leaf: jax.Array):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
