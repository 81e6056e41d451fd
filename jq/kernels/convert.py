"""Weights in their kernels' layouts."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jq.pallas_kernels.capability import HOPPER
from jq.pallas_kernels.weight import W4Weight, w4_weight
from jq.pallas_kernels.weight8 import W8Weight, w8_weight
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.support import Capability


@functools.partial(jax.jit, static_argnames=("dtype", "capability"))
def to_kernel(w: QTensor, dtype: str, capability: Capability = HOPPER) -> PreparedTensor:
    """Bring a weight that `explain` calls a kernel for into that kernel's layout, on its device.

    Args:
      w: [..., K, N]; leading axes are kept.
      dtype: name of the dtype of the activations.
      capability: of the device that it is for.
    Stacked weights are converted one after the other, so that only one is ever unpacked.
    """
    convert = functools.partial(_int4, dtype=dtype) if w.spec.activation is None else _eight_bit
    lead = w.shape[:-2]
    if not lead:
        weight = convert(w)
    else:
        flat = jax.tree.map(lambda a: a.reshape(math.prod(lead), *a.shape[len(lead) :]), w)
        weight = jax.lax.map(convert, flat)
        weight = jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), weight)
    return PreparedTensor(weight, w.order, w.input_scale, w.spec, capability)


def _int4(w: QTensor, dtype: Any) -> W4Weight:
    columns = (w.scale.shape[-2], w.n)
    zero = w.zeros()
    if zero is not None:
        zero = jnp.broadcast_to(zero, columns)
    scale = jnp.broadcast_to(w.scale.astype(jnp.float32), columns)
    return w4_weight(w.unsigned_codes(), scale, zero, dtype=dtype)


def _eight_bit(w: QTensor) -> W8Weight:
    return w8_weight(w.codes, w.scale.astype(jnp.float32))
