"""Folding a scale per input channel into the op before, exactly.

Linears that read x compute x W.  With s > 0 per channel, (x / s) (s W) is the same; dividing by s
is left to the op that produces x: the weight of a norm, or the output channels of a linear, up to
operations in between that commute with it (attention mixes tokens, not the channels of v; a gate
multiplies channel by channel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jq import tree
from jq.blockwise import LinearGroup, Params
from jq.errors import SpecError
from jq.qtensor import QTensor

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def shared_mean(x: Float[Array, "K"], group: LinearGroup) -> Float[Array, "K"]:
    """Average over the input channels that one output channel of the producer feeds.

    With grouped-query attention several query heads read one value head, so their scales must
    agree.
    """
    if group.share == 1:
        return x
    heads = x.reshape(-1, group.share, group.head_dim)
    return jnp.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)


def shared_max(x: Float[Array, "K"], group: LinearGroup) -> Float[Array, "K"]:
    """As `shared_mean`, the largest."""
    if group.share == 1:
        return x
    heads = x.reshape(-1, group.share, group.head_dim)
    return jnp.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)


def fold(
    params: Params, group: LinearGroup, scale: Float[Array, "K"]
) -> tuple[dict[str, Any], jax.Array]:
    """Multiply the group's kernels by `scale` and divide its producer by it.

    Args:
      params: a block's parameters, none of the touched ones quantized.  Kernels in float32 lose
        nothing.
      group: its producer is set; `scale` is equal over the channels that share one (`shared_mean`).
      scale: positive float32 [K].
    Returns: new parameters, dtypes kept, and the scale really used: where a norm's weight is stored
      in fewer bits, the scale is moved to where norm / scale is exactly representable (by less than
      a rounding).
    Raises: SpecError when the producer is unknown or a touched weight is already quantized.
    """
    if group.producer is None:
        raise SpecError(f"group {group.name!r} has no producer to fold a scale into")
    out = dict(params)
    if group.producer_kind == "norm":
        path = f"{group.producer}/scale"
        norm = _plain(params, path)
        folded = _scaled(norm, 1.0 / scale)
        exact = norm.astype(jnp.float32) / folded.astype(jnp.float32)
        scale = jnp.where(jnp.isfinite(exact) & (exact > 0), exact, scale)
        out = tree.replace(out, path, folded)
    else:
        inverse = 1.0 / scale
        if group.share > 1:
            inverse = inverse.reshape(-1, group.share, group.head_dim)[:, 0].reshape(-1)
        path = f"{group.producer}/kernel"
        out = tree.replace(out, path, _scaled(_plain(params, path), inverse[None, :]))
        path = f"{group.producer}/bias"
        if tree.has(params, path):
            out = tree.replace(out, path, _scaled(_plain(params, path), inverse))
    for linear in group.linears:
        path = f"{linear}/kernel"
        out = tree.replace(out, path, _scaled(_plain(out, path), scale[:, None]))
    return out, scale


def restore_dtypes(params: Any, dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """Cast plain leaves back to the dtypes [path -> dtype] they had before they were widened.

    Quantized leaves, and paths that `dtypes` does not name, stay as they are.
    """
    for path, leaf in tree.leaves(params):
        if path in dtypes and not isinstance(leaf, QTensor) and leaf.dtype != dtypes[path]:
            params = tree.replace(params, path, leaf.astype(dtypes[path]))
    return params


def _plain(params: Params, path: str) -> jax.Array:
    leaf = tree.get(params, path)
    if isinstance(leaf, QTensor):
        raise SpecError(
            f"{path}: already quantized, a scale can no longer be folded into it exactly"
        )
    return leaf


def _scaled(w: jax.Array, by: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) * by).astype(w.dtype)
