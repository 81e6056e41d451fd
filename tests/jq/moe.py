"""A small mixture-of-experts MLP in Flax, with capacity buffers, as a user would write it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jq.experts import expert_matmul

WIDTH, INNER, EXPERTS, CHOICES = 16, 32, 4, 2


class ExpertLinear(nn.Module):
    """x [E, C, K] -> [E, C, N], a kernel per expert."""

    features: int

    @nn.compact
    def __call__(self, x, mask=None):
        shape = (x.shape[0], x.shape[-1], self.features)
        if self.has_variable("params", "kernel"):  # which may be quantized
            kernel = self.get_variable("params", "kernel")
        else:
            kernel = self.param("kernel", nn.initializers.lecun_normal(batch_axis=0), shape)
        return expert_matmul(x, kernel)


class MoE(nn.Module):
    """x [T, D] -> [T, D]: the two experts that a router likes best, weighed by it.

    pass_mask: tell the linears which places of the buffers hold tokens.
    """

    pass_mask: bool = False

    @nn.compact
    def __call__(self, x):
        weight, chosen = route(nn.Dense(EXPERTS, use_bias=False, name="router")(x))
        place = jax.nn.one_hot(chosen.reshape(-1), EXPERTS, dtype=jnp.int32)
        place = (jnp.cumsum(place, axis=0) * place).max(axis=1) - 1  # in its expert's buffer
        rows = jnp.repeat(x, CHOICES, axis=0)
        buffers = (
            jnp.zeros((EXPERTS, len(rows), x.shape[1])).at[chosen.reshape(-1), place].set(rows)
        )
        mask = jnp.zeros(buffers.shape[:2], bool).at[chosen.reshape(-1), place].set(True)
        told = (mask,) if self.pass_mask else ()
        gate = ExpertLinear(INNER, name="gate")(buffers, *told)
        hidden = jax.nn.silu(gate) * ExpertLinear(INNER, name="up")(buffers, *told)
        out = ExpertLinear(WIDTH, name="down")(hidden, *told)[chosen.reshape(-1), place]
        return jnp.sum(out.reshape(-1, CHOICES, x.shape[1]) * weight[:, :, None], axis=1)


def route(logits):
    """(weights, experts) [T, CHOICES] of the best."""
    best, chosen = jax.lax.top_k(logits, CHOICES)
    return jax.nn.softmax(best, axis=1), chosen
