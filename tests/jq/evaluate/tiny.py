"""A tiny model that speaks the blockwise protocol, and the same in NumPy float64."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq.blockwise import LinearGroup
from jq.matmul import qmatmul

VOCAB, WIDTH = 23, 8


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Blocks add tanh(running mean of h (or h itself in odd blocks) @ kernel); then a head."""

    blocks: int = 3
    vocab: int = VOCAB

    @property
    def block_names(self):
        return tuple(f"layers_{i}" for i in range(self.blocks))

    @property
    def linear_groups(self):
        return (LinearGroup("only", ("mix",)),)

    def block_kind(self, name):
        return "mean" if int(name[-1]) % 2 == 0 else "plain"

    def embed(self, params, tokens):
        return jnp.take(params["embed"], tokens, axis=0)

    def block_stage(self, kind, index, params, x, carry, mask):
        if index == 1:
            return carry + jnp.tanh(qmatmul(x, params["mix"]["kernel"])), None
        if kind == "plain":
            return x, x
        count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)
        return jnp.cumsum(x, axis=1) / count[None, :, None], x

    def logits(self, params, h):
        return h @ params["head"]


def make_params(seed=0, model=None, noise=0.0):
    """Float32 parameters; `noise` perturbs the kernels only, as quantization does."""
    model = model or Tiny()
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 99)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params: dict[str, Any] = {
        "embed": normal(model.vocab, WIDTH),
        "head": normal(WIDTH, model.vocab),
    }
    for name in model.block_names:
        kernel = normal(WIDTH, WIDTH) + noise * other.normal(size=(WIDTH, WIDTH))
        params[name] = {"mix": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    return params


def compiled_programs(function: Any, run) -> int:
    """How many programs a jitted function compiles during `run()`."""
    function.clear_cache()
    run()
    return function._cache_size()


def numpy_logits(model, params, tokens):
    """[T] -> float64 [T, V], one window."""
    h = np.asarray(params["embed"], np.float64)[tokens]
    for name in model.block_names:
        x = h
        if model.block_kind(name) == "mean":
            x = np.stack([h[: t + 1].mean(axis=0) for t in range(len(h))])
        h = h + np.tanh(x @ np.asarray(params[name]["mix"]["kernel"], np.float64))
    return h @ np.asarray(params["head"], np.float64)
