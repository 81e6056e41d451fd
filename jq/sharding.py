"""Quantized weights cut over the devices of a mesh.

A kernel is a call that the compiler cannot cut by itself, so a product with a sharded weight runs
under `jax.shard_map`, where `qmatmul` sees a shard as a weight of its own:

    specs = partition_specs(w, k=None, n="model")           # columns over the axis "model"
    y = jax.shard_map(qmatmul, mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "model"),
                      check_vma=False)(x, w)

`sharded_qmatmul` is that, with the sum over K where K is cut.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jq.cuts import misfit
from jq.errors import SpecError
from jq.matmul import qmatmul, reorder
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor

Axes = str | tuple[str, ...] | None


def partition_specs(
    w: QTensor | PreparedTensor, k: Axes = None, n: Axes = None, lead: tuple[Axes, ...] = ()
) -> Any:
    """The PartitionSpec of every array of a weight [..., K, N] whose K and N lie over mesh axes.

    What a cut along K does not divide (a scale per column, a static activation scale) is repeated
    on every shard; so is an act order, whose inputs lie anywhere (see `sharded_qmatmul`).

    Args:
      w: the weight, or its shapes (jax.eval_shape).
      k, n: mesh axes, or None for axes that are not cut.
      lead: those of the leading axes, if any is cut.
    Returns: `w` with a PartitionSpec in the place of each array: in_specs for `jax.shard_map`.
    """
    lead = (*lead, *(None,) * (w.ndim - 2 - len(lead)))

    def groups(scale: Any) -> P:
        return P(*lead, k if scale.shape[-2] > 1 else None, n if scale.shape[-1] > 1 else None)

    order = None if w.order is None else P(*lead, None)
    static = None if w.input_scale is None else P(*lead)
    if isinstance(w, QTensor):
        zero = None if w.zero_point is None else groups(w.zero_point)
        return dataclasses.replace(
            w,
            codes=P(*lead, k, n),
            scale=groups(w.scale),
            zero_point=zero,
            order=order,
            input_scale=static,
        )
    if w.spec.activation is not None:
        scale = P(*lead, n) if w.weight.block is None else P(*lead, n, k)
        weight = dataclasses.replace(w.weight, codes=P(*lead, n, k), scale=scale)
        return dataclasses.replace(w, weight=weight, order=order, input_scale=static)
    offset = None if w.weight.offset is None else groups(w.weight.offset)
    weight = dataclasses.replace(
        w.weight,
        fragments=P(*lead, n, k, None, None),
        scale=groups(w.weight.scale),
        offset=offset,
        normaliser=P(*lead, n),
    )
    return dataclasses.replace(w, weight=weight, order=order, input_scale=static)


def sharded_qmatmul(
    x: jax.Array,
    w: QTensor | PreparedTensor,
    mesh: Mesh,
    *,
    k: Axes = None,
    n: Axes = None,
    rows: Axes = None,
) -> jax.Array:
    """`qmatmul` of every shard of a weight [K, N], summed over the shards of K.

    Args:
      x: [..., K], its last axis cut like K and its first one over `rows`.
      w: the weight; an act order is applied to the whole x, before it is cut.
      mesh: of the devices.
      k, n: mesh axes that cut K and N.
      rows: mesh axes that cut the first axis of x.
    Returns: [..., N], cut over `rows` and `n`.  Partial sums are rounded to x's dtype, and added in
      float32.
    Raises: SpecError when a shard would cut a group, a byte of packed codes or a kernel's tile.
    """
    tiled = isinstance(w, PreparedTensor)
    if reason := misfit(w.spec, w.k, w.n, axes_of(mesh, k), axes_of(mesh, n), tiled=tiled):
        raise SpecError(f"a weight of shape {w.shape} cannot be cut so: {reason}")
    if w.order is not None:
        x = reorder(x, w.order)
        w = dataclasses.replace(w, order=None)

    def product(x: jax.Array, w: QTensor | PreparedTensor) -> jax.Array:
        y = qmatmul(x, w)
        if k is None:
            return y
        return jax.lax.psum(y.astype(jnp.float32), k).astype(y.dtype)

    between = (None,) * (x.ndim - 2)
    first = () if x.ndim == 1 else (rows,)
    return jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(P(*first, *between, k), partition_specs(w, k, n)),
        out_specs=P(*first, *between, n),
        check_vma=False,
    )(x, w)


def axes_of(mesh: Any, axes: Any) -> int:
    """Into how many parts an array's axis is cut by mesh axes."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    return math.prod(mesh.shape[name] for name in names)
