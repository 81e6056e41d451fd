"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the activations' outliers into the weights.

s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) per input channel j (equation 4); x / s and s W are
then both easy to round to 8 bits.  How activations are quantized is the spec's: `jq.spec.w8a8`
gives the paper's O1, O2 and O3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jq import grid
from jq.errors import SpecError
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.spec import FP8_MAX, QuantSpec

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Exponents tried by alpha="auto".
AUTO_ALPHAS = tuple(i / 20 for i in range(0, 21))
MIN_SCALE = 1e-5


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """Options of SmoothQuant.

    alpha: migration strength: how much of the difficulty moves from activations to weights.  The
      authors use 0.5 (OPT, BLOOM), 0.75 (GLM), 0.8 (LLaMA-1, Mistral, Mixtral), 0.85 (Llama-2,
      Llama-3), 0.9 (Llama-2-70B). "auto" tries 0, 0.05, ..., 1, and no smoothing, for each
      group of linears and keeps the least output error.
    smooth: "norm" smooths what a norm produces (the paper); "all" also what a linear produces (v ->
      o, up -> down).
    search_tokens: calibration tokens for alpha="auto".
    rounding: what rounds the smoothed weights.
    """

    alpha: float | Literal["auto"] = 0.8
    smooth: Literal["norm", "all"] = "norm"
    search_tokens: int = 4096
    rounding: RTN | GPTQ = RTN()

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= float(self.alpha) <= 1:
            raise SpecError(f"alpha {self.alpha} is neither 'auto' nor in [0, 1]")

    @property
    def needs_statistics(self) -> bool:
        return True


def weight_max(weights: Sequence[jax.Array]) -> Float[Array, "K"]:
    """max|w_j| over the outputs of all linears that share the input."""
    maxima = [jnp.max(jnp.abs(w.astype(jnp.float32)), axis=1) for w in weights]
    return jnp.stack(maxima).max(axis=0)


def smoothing_scale(
    alpha: float | jax.Array, x_max: Float[Array, "K"], w_max: Float[Array, "K"]
) -> Float[Array, "K"]:
    """Equation 4; 1 for channels whose inputs or weights are all zero."""
    alive = (x_max > 0) & (w_max > 0)
    x = jnp.where(alive, x_max, 1.0)
    w = jnp.where(alive, w_max, 1.0)
    scale = jnp.exp(alpha * jnp.log(x) - (1.0 - alpha) * jnp.log(w))
    return jnp.where(alive, jnp.maximum(scale, MIN_SCALE), 1.0)


def search_alpha(
    x_max: Float[Array, "K"],
    w_max: Float[Array, "K"],
    loss: Callable[[jax.Array], jax.Array],
    total: Callable[[jax.Array], jax.Array] = lambda losses: losses,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scale with the least loss: that of one of AUTO_ALPHAS, or none.

    No alpha gives scales of 1, which are the best where no channel stands out.
    total: makes all losses those of the whole, where a device's `loss` knows its own samples only.
    Returns: (scale [K], alpha, losses); losses[0] is that of no smoothing, for which alpha is NaN.
    """
    alphas = jnp.asarray((jnp.nan, *AUTO_ALPHAS), jnp.float32)

    def scale_of(alpha: jax.Array) -> jax.Array:
        return jnp.where(jnp.isnan(alpha), 1.0, smoothing_scale(alpha, x_max, w_max))

    losses = total(lax.map(lambda alpha: loss(scale_of(alpha)), alphas))
    best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    return scale_of(alphas[best]), alphas[best], losses


def output_loss(
    weights: Sequence[jax.Array], x: Float[Array, "T K"], spec: QuantSpec
) -> Callable[[jax.Array], jax.Array]:
    """Loss of a scale: squared error of the outputs on sample inputs x, both operands rounded."""
    x = x.astype(jnp.float32)
    w = jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1)
    # A GPU's default, TF32, would be as far off as what is to be measured.
    dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    target = dot(x, w)

    def loss(scale: jax.Array) -> jax.Array:
        rounded = grid.effective_weight(w, scale, spec)
        return jnp.sum(jnp.square(dot(effective_inputs(x, scale, spec), rounded) - target))

    return loss


def effective_inputs(
    x: Float[Array, "T K"], scale: Float[Array, "K"], spec: QuantSpec
) -> Float[Array, "T K"]:
    """s Q(x / s): what the rounded activations are to unscaled weights."""
    return fake_activations(x / scale[None, :], spec) * scale[None, :]


def fake_activations(x: Float[Array, "T K"], spec: QuantSpec) -> Float[Array, "T K"]:
    """x rounded as the spec's activations are (static ones with the range of these very rows)."""
    act = spec.activation
    if act is None:
        return x
    shape = x.shape
    if act.granularity == "group":
        x = x.reshape(shape[0], -1, spec.group_size)
    top = FP8_MAX if spec.is_float else 127.0
    size = jnp.max(jnp.abs(x), axis=None if act.granularity == "tensor" else -1, keepdims=True)
    scale = jnp.where(size > 0, size / top, 1.0)
    codes = jnp.clip(x / scale, -top, top)
    codes = codes.astype(jnp.float8_e4m3fn).astype(x.dtype) if spec.is_float else jnp.round(codes)
    return (codes * scale).reshape(shape)
