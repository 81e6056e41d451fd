"""A model of a user's own: nothing of `jq.models`, only the blockwise protocol."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.blockwise import LinearGroup
from jq.matmul import qmatmul

VOCAB, WIDTH, INNER = 29, 16, 32


@dataclasses.dataclass(frozen=True)
class Toy:
    """h + relu((h * gain) @ up + bias) @ down, twice; a bag of words with positions."""

    block_names: tuple[str, ...] = ("first", "second")

    @property
    def linear_groups(self):
        return (
            LinearGroup("wide", ("up",), "gain", "norm"),
            # relu commutes with a positive scale per channel.
            LinearGroup("narrow", ("down",), "up", "linear"),
        )

    def block_kind(self, name):
        return None

    def embed(self, params, tokens):
        place = jnp.arange(tokens.shape[1], dtype=jnp.float32) / tokens.shape[1]
        return jnp.take(params["table"], tokens, axis=0) + place[None, :, None]

    def block_stage(self, kind, index, params, x, carry, mask):
        if index == 0:
            return x * params["gain"]["scale"][None, None, :], {"residual": x}
        if index == 1:
            bias = params["up"]["bias"][None, None, :]
            return jax.nn.relu(qmatmul(x, params["up"]["kernel"]) + bias), carry
        return carry["residual"] + qmatmul(x, params["down"]["kernel"]), None

    def logits(self, params, h):
        return h @ params["out"]


def make_params(seed: int = 0, model: Toy | None = None) -> dict[str, Any]:
    """float32 parameters."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    params: dict[str, Any] = {"table": normal(VOCAB, WIDTH) * 5, "out": normal(WIDTH, VOCAB)}
    for name in (model or Toy()).block_names:
        params[name] = {
            "gain": {"scale": jnp.asarray(rng.uniform(0.5, 2, WIDTH), jnp.float32)},
            "up": {"kernel": normal(WIDTH, INNER) * 2, "bias": normal(INNER)},
            "down": {"kernel": normal(INNER, WIDTH)},
        }
    return params


def tokens(samples: int = 6, length: int = 12, seed: int = 3) -> np.ndarray:
    """int32 [samples, length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (samples, length), dtype=np.int32)


def forward(model: Toy, params: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of the whole model, through the protocol."""
    h = model.embed(params, jnp.asarray(ids))
    for name in model.block_names:
        x, carry = h, None
        for index in range(len(model.linear_groups) + 1):
            x, carry = model.block_stage(None, index, params[name], x, carry, None)
        h = x
    return np.asarray(model.logits(params, h), np.float64)
