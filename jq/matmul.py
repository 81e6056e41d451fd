"""`qmatmul`: the product of every linear, whatever its weight is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jq.errors import SpecError
from jq.kernels import products
from jq.kernels.activations import QuantizedActivations, plan_of, quantize_input
from jq.packing import packed_size
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.sharded import ShardedTensor


def qmatmul(
    x: jax.Array | QuantizedActivations, w: jax.Array | QTensor | PreparedTensor | ShardedTensor
) -> jax.Array:
    """y = x @ w for a plain, a quantized or a prepared weight, whole or cut over a mesh.

    Args:
      x: floating [..., K], or what `jq.kernels.activations` made of it for several linears.
      w: Array [K, N], or QTensor or PreparedTensor of logical shape [K, N] (index or scan over
        stacked ones first).  Inside `jax.shard_map`, its shard (see `jq.sharding`).
    Returns: [..., N] in x's dtype.  Products accumulate in float32, or int32 for int8 operands.

    Differentiable in x: the gradient of a weight that runs with 8-bit activations is that of the
    dequantized weight (straight-through estimate).  A prepared weight, and one with 8-bit
    activations, is a constant: its own gradients are zeros.
    Raises: SpecError when the sizes, or the formats of activations, do not match.
    """
    if isinstance(w, ShardedTensor):
        return _sharded(x, w)
    if isinstance(x, QuantizedActivations):
        return _quantized(x, w)
    if not isinstance(w, QTensor | PreparedTensor):
        return products.plain(x, w)
    w = _checked(x.shape, w)
    if w.order is not None:
        x = reorder(x, w.order)
    if w.spec.activation is None:
        return products.weight_only(x, w)
    return products.eight_bit(quantize_input(x, plan_of(w), w.input_scale), w)


def _sharded(x: jax.Array | QuantizedActivations, w: ShardedTensor) -> jax.Array:
    """Every device multiplies with its shard."""
    from jq.sharding import sharded_qmatmul  # which multiplies shards with this module

    if isinstance(x, QuantizedActivations):
        raise SpecError("quantized activations are for whole weights; give x itself")
    return sharded_qmatmul(x, w.weight, w.mesh, k=w.k, n=w.n)


def reorder(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [..., K] with its inputs in a weight's stored order, int32 [K]."""
    # Without the barrier XLA's CPU backend gathers x into columns: no bfloat16 dot takes them.
    return jax.lax.optimization_barrier(jnp.take(x, order, axis=-1))


def _quantized(x: QuantizedActivations, w: jax.Array | QTensor | PreparedTensor) -> jax.Array:
    """The product of activations that are quantized already."""
    if not isinstance(w, QTensor | PreparedTensor) or w.spec.activation is None:
        raise SpecError("quantized activations are for weights that run with 8-bit activations")
    if x.plan != plan_of(w) or w.order is not None:
        raise SpecError(
            f"activations were quantized for {x.plan}; the weight wants {plan_of(w)}"
            + ", in its own order" * (w.order is not None)
        )
    return products.eight_bit(x, _checked(x.shape, w))


def _checked(shape: tuple[int, ...], w: QTensor | PreparedTensor) -> QTensor | PreparedTensor:
    """The weight that multiplies x of this shape."""
    if isinstance(w, QTensor):
        w = _with_sizes_of_arrays(w)
    if w.ndim != 2 or shape[-1] != w.k:
        raise SpecError(
            f"x {shape} does not multiply a quantized weight of logical shape {w.shape}"
        )
    return w


def _with_sizes_of_arrays(w: QTensor) -> QTensor:
    """`w`, or what it is inside `jax.shard_map`: a shard, whose static sizes are the whole's."""
    rows, n = w.codes.shape[-2:]
    packed = w.codes.dtype == jnp.uint8
    if (rows, n) == (packed_size(w.k, w.spec.bits) if packed else w.k, w.n):
        return w
    return dataclasses.replace(w, k=rows * 8 // w.spec.bits if packed else rows, n=n)
