"""A forward pass through the blockwise protocol: one compiled program per kind of block.

The whole model is never one program, so compile time does not grow with depth, and the parameters
of a block need to be on the device only while it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax

from jq.blockwise import BlockwiseModel, Params


def hidden_states(model: BlockwiseModel, params: Params, tokens: jax.Array) -> jax.Array:
    """The last block's output.

    Args:
        model: hashable; equal models share their compiled programs.
        params: the whole tree; kernels may be QTensors, leaves may be NumPy arrays.
        tokens: int32 `[B, T]`.
    Returns: `[B, T, D]` in the model's dtype.
    """
    h = _embed(model, outer_params(model, params), tokens)
    for name in model.block_names:
        h = _block(model, model.block_kind(name), params[name], h)
    return h


def outer_params(model: BlockwiseModel, params: Params) -> dict[str, Any]:
    """What is no block's: embedding, final norm, head."""
    blocks = set(model.block_names)
    return {name: value for name, value in params.items() if name not in blocks}


def vocabulary_size(model: BlockwiseModel, params: Params) -> int:
    """How many logits the model makes, without running it."""
    tokens = jax.ShapeDtypeStruct((1, 1), "int32")
    outer = outer_params(model, params)
    h = jax.eval_shape(model.embed, outer, tokens)
    return jax.eval_shape(model.logits, outer, h).shape[-1]


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: BlockwiseModel, outer: Params, tokens: jax.Array) -> jax.Array:
    return model.embed(outer, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(model: BlockwiseModel, kind: Hashable, params: Params, h: jax.Array) -> jax.Array:
    x, carry = h, None
    for index in range(len(model.linear_groups) + 1):
        x, carry = model.block_stage(kind, index, params, x, carry, None)
    return x
