"""Linear, Embed, RMSNorm and the gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jq.kernels.activations import Plan, QuantizedActivations, normalised_input, rms_norm
from jq.matmul import qmatmul
from jq.models.config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


class Linear(nn.Module):
    """y = x @ kernel (+ bias), kernel `[K, N]` an array or a QTensor; x may be quantized."""

    features: int
    use_bias: bool = False
    initializer_range: float = 0.02
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B K"] | QuantizedActivations) -> Float[Array, "*B N"]:
        # `self.param` compares shapes with the initializer's and would refuse a packed kernel.
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            init = nn.initializers.normal(self.initializer_range)
            kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        y = qmatmul(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        return y


class Embed(nn.Module):
    """Token embedding `[V, D]`, which also makes the logits of a model with tied weights."""

    vocab_size: int
    features: int
    initializer_range: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(self.initializer_range)
        shape = (self.vocab_size, self.features)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)

    def __call__(self, tokens: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(self.embedding, jnp.asarray(tokens), axis=0).astype(self.dtype)

    def attend(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """h @ embedding.T, accumulated in float32."""
        table = self.embedding.astype(h.dtype)
        return jnp.einsum("btd,vd->btv", h, table, preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang & Sennrich 2019)."""

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], plan: Plan | None = None) -> Any:
        """[..., D] in x's dtype; with a plan, which linears that read it share, in 8 bits."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        if plan is None:
            return rms_norm(x, scale, self.epsilon)
        return normalised_input(x, scale, self.epsilon, plan)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), in two steps (Shazeer 2020, arXiv:2002.05202)."""

    config: ModelConfig
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        linear = partial(
            Linear,
            use_bias=c.mlp_bias,
            initializer_range=c.initializer_range,
            param_dtype=self.param_dtype,
        )
        self.gate_proj = linear(c.intermediate_size)
        self.up_proj = linear(c.intermediate_size)
        self.down_proj = linear(c.hidden_size)

    def hidden(self, x: Float[Array, "B T D"] | QuantizedActivations) -> Float[Array, "B T F"]:
        """The input of `down_proj`."""
        return _ACTIVATIONS[self.config.hidden_act](self.gate_proj(x)) * self.up_proj(x)

    def output(self, x: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        return self.down_proj(x)
