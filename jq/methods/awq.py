"""AWQ, activation-aware weight quantization (Lin et al., arXiv 2306.00978).

Channels with large activations get finer grids: their weights are multiplied by s and the
activations divided by it.  s = mean|x|^a (section 3.2); "duo scaling", as AutoAWQ has it, divides
that by mean|w|^(1-a) of the normalised weights.  The exponent a is searched on a grid for the least
error of what follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from jq import grid
from jq.errors import SpecError
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.spec import QuantSpec
from jq.statistics import output_energy

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Scales stay within a range that every 16-bit producer can take.
MIN_SCALE, MAX_SCALE = 1e-4, 1e4


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Options of AWQ.

    n_grid: exponents tried, 0, 1/n_grid, ..., beside no scaling at all.
    search_scale: False takes `exponent` as it is.
    exponent: the exponent without a search.
    duo_scaling: divide by the weights' magnitudes too, as AutoAWQ does; the paper does not.
    search_tokens: calibration tokens on which attention and MLP outputs are compared; single
      linears are compared on all of them, through the Gram matrix.
    rounding: what rounds the scaled weights; RTN(clip="output") is AWQ's own clip search.
    """

    n_grid: int = 20
    search_scale: bool = True
    exponent: float = 0.5
    duo_scaling: bool = False
    search_tokens: int = 4096
    rounding: RTN | GPTQ = RTN(clip="output")

    def __post_init__(self) -> None:
        if self.n_grid < 1:
            raise SpecError(f"n_grid {self.n_grid} is not positive")
        if not 0 <= self.exponent <= 1:
            raise SpecError(f"exponent {self.exponent} is not in [0, 1]")

    @property
    def needs_statistics(self) -> bool:
        return True


def weight_magnitude(weights: Sequence[jax.Array], spec: QuantSpec) -> Float[Array, "K"]:
    """[K] in [0, 1]: |w| over the largest of its group, averaged over all linears' outputs."""
    w = jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1)
    groups = jnp.abs(grid.split_groups(w, spec))
    largest = groups.max(axis=1, keepdims=True)
    return (groups / jnp.where(largest > 0, largest, 1.0)).mean(axis=2).reshape(-1)


def scale_of(
    exponent: float | jax.Array, abs_mean: Float[Array, "K"], magnitude: Float[Array, "K"] | None
) -> Float[Array, "K"]:
    """The scale of an exponent, normalised to sqrt(max * min) = 1; dead channels keep 1.

    magnitude: `weight_magnitude` for duo scaling, else None.
    """
    alive = abs_mean > 0
    base = jnp.where(alive, abs_mean, 1.0)
    log = exponent * jnp.log(base)
    if magnitude is not None:
        log = log - (1.0 - exponent) * jnp.log(magnitude + 1e-4)
    high = jnp.max(jnp.where(alive, log, -jnp.inf))
    low = jnp.min(jnp.where(alive, log, jnp.inf))
    centre = jnp.where(jnp.any(alive), (high + low) / 2, 0.0)
    scale = jnp.where(alive, jnp.exp(log - centre), 1.0)
    return jnp.clip(scale, MIN_SCALE, MAX_SCALE)


def search_scale(
    abs_mean: Float[Array, "K"],
    magnitude: Float[Array, "K"] | None,
    loss: Callable[[jax.Array], jax.Array],
    n_grid: int,
    total: Callable[[jax.Array], jax.Array] = lambda losses: losses,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scale with the least loss among no scaling and `n_grid` exponents.

    loss: scale [K] -> scalar.
    total: makes all losses those of the whole, where a device's `loss` knows its own samples only.
    Returns: scale [K]; the losses, float32 [1 + n_grid], no scaling first; and the index of the
      best.
    """
    exponents = jnp.arange(n_grid, dtype=jnp.float32) / n_grid

    def attempt(exponent):
        plain = exponent < 0
        scale = jnp.where(plain, 1.0, scale_of(exponent, abs_mean, magnitude))
        return loss(scale)

    losses = total(lax.map(attempt, jnp.concatenate([jnp.full((1,), -1.0), exponents])))
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    best = jnp.argmin(losses)
    chosen = scale_of(exponents[jnp.maximum(best - 1, 0)], abs_mean, magnitude)
    return jnp.where(best == 0, 1.0, chosen), losses, best


def gram_loss(
    weights: Sequence[jax.Array], gram: Float[Array, "K K"], spec: QuantSpec
) -> Callable[[jax.Array], jax.Array]:
    """Loss of a scale: squared error of the outputs over all calibration tokens, tr(D' H D)."""

    def loss(scale: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for w in weights:
            error = grid.effective_weight(w, scale, spec) - w.astype(jnp.float32)
            total += jnp.sum(output_energy(gram, error))
        return total

    return loss
