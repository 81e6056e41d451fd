"""`qmatmul`: the one place where the kernel of a linear is chosen."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jq.errors import SpecError
from jq.pallas_kernels import reference
from jq.qtensor import QTensor


def qmatmul(x: jax.Array, w: jax.Array | QTensor) -> jax.Array:
    """y = x @ w for a plain or a quantized weight.

    Args:
      x: floating [..., K].
      w: Array [K, N], or QTensor of logical shape [K, N] (index or scan over stacked ones first).
    Returns: [..., N] in x's dtype.  Products accumulate in float32, or int32 for int8 operands.

    Differentiable in x: the gradient of a weight that runs with 8-bit activations is that of the
    dequantized weight (straight-through estimate).
    Raises: SpecError when the sizes do not match.
    """
    if not isinstance(w, QTensor):
        return reference.weight_only(x, w)
    if w.ndim != 2 or x.shape[-1] != w.k:
        raise SpecError(
            f"x {x.shape} does not multiply a quantized weight of logical shape {w.shape}"
        )
    if w.order is not None:
        # Without the barrier XLA's CPU backend gathers x into columns: no bfloat16 dot takes them.
        x = jax.lax.optimization_barrier(jnp.take(x, w.order, axis=-1))
    if w.spec.activation is None:
        return reference.weight_only(x, w.dequantize_stored(x.dtype))
    return _eight_bit(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=())
def _eight_bit(x: jax.Array, w: QTensor) -> jax.Array:
    act = w.spec.activation
    assert act is not None
    dtype = jnp.dtype(act.dtype)
    scale = w.scale.astype(jnp.float32)
    if act.granularity == "group":
        groups = x.reshape(*x.shape[:-1], scale.shape[0], -1)
        x_scale = reference.activation_scale(groups, dtype, -1)
        codes = reference.quantize_activations(groups, x_scale, dtype)
        return reference.block_scaled_matmul(codes, x_scale, w.codes, scale, x.dtype)
    if w.input_scale is not None:
        x_scale = w.input_scale.astype(jnp.float32)
    else:
        x_scale = reference.activation_scale(x, dtype, -1 if act.granularity == "token" else None)
    codes = reference.quantize_activations(x, x_scale, dtype)
    return reference.scaled_matmul(codes, x_scale, w.codes, scale, x.dtype)


def _eight_bit_forward(x, w):
    return _eight_bit(x, w), w


def _eight_bit_backward(w, dy):
    dx = reference.weight_only(dy, w.dequantize_stored(dy.dtype).T)
    return dx, jax.tree.map(_zero_tangent, w)


def _zero_tangent(leaf: jax.Array):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


_eight_bit.defvjp(_eight_bit_forward, _eight_bit_backward)
