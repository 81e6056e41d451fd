"""Which methods scale which inputs, and the statistics that their scales are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jq.blockwise import LinearGroup
from jq.errors import SpecError
from jq.folding import shared_max, shared_mean
from jq.methods import awq, smoothquant
from jq.methods.awq import AWQ
from jq.methods.smoothquant import SmoothQuant
from jq.recipe import Method, Rule
from jq.spec import QuantSpec
from jq.statistics import InputStats

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def scales_input(method: Method | None, group: LinearGroup) -> bool:
    """Whether the method moves a scale between this group's weights and its input."""
    if group.producer is None:
        return False
    match method:
        case AWQ():
            return True
        case SmoothQuant():
            return method.smooth == "all" or group.producer_kind == "norm"
        case _:
            return False


def scaling_method(
    where: str, group: LinearGroup, rules: Sequence[Rule | None]
) -> AWQ | SmoothQuant | None:
    """The method that scales a group's input, or None.

    Args:
      where: the group's place in error messages.
      group: see `LinearGroup`.
      rules: what decides about each of its linears; None for those in full precision.
    Raises: SpecError where linears that read one input are given different methods.
    """
    methods = {rule.method for rule in rules if rule is not None}
    scaling = {m for m in methods if scales_input(m, group)}
    if len(scaling) > 1 or (scaling and methods != scaling):
        raise SpecError(
            f"{where}: {', '.join(group.linears)} read the same input and are given different "
            f"methods, {', '.join(sorted(map(str, methods)))}: one scale must serve them all"
        )
    chosen = next(iter(scaling), None)
    assert chosen is None or isinstance(chosen, AWQ | SmoothQuant)
    return chosen


def awq_terms(
    group: LinearGroup,
    weights: Sequence[tuple[Float[Array, "K _"], QuantSpec]],
    stats: InputStats,
    method: AWQ,
) -> tuple[Float[Array, "K"], Float[Array, "K"] | None]:
    """mean|x| and, for duo scaling, the weights' magnitude: what `awq.scale_of` takes."""
    abs_mean = shared_mean(stats.abs_mean, group)
    if not method.duo_scaling:
        return abs_mean, None
    parts = [awq.weight_magnitude([w], spec) * w.shape[1] for w, spec in weights]
    magnitude = sum(parts[1:], parts[0]) / sum(w.shape[1] for w, _ in weights)
    return abs_mean, shared_mean(magnitude, group)


def smooth_terms(
    group: LinearGroup, weights: Sequence[Float[Array, "K _"]], stats: InputStats
) -> tuple[Float[Array, "K"], Float[Array, "K"]]:
    """max|x| and max|w|: what `smoothquant.smoothing_scale` takes."""
    return shared_max(stats.abs_max, group), shared_max(smoothquant.weight_max(weights), group)


def total_loss(
    losses: Sequence[Callable[[jax.Array], jax.Array]],
) -> Callable[[jax.Array], jax.Array]:
    """The sum of several losses of one scale."""

    def total(scale: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, [loss(scale) for loss in losses])

    return total
