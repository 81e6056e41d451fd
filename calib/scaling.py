"""Choosing the scale of a group's input channels (AWQ, SmoothQuant) with the block around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jq import grid, tree
from jq.blockwise import BlockwiseModel
from jq.calib.stages import Stream
from jq.methods import awq, smoothquant
from jq.methods.awq import AWQ
from jq.methods.smoothquant import SmoothQuant
from jq.scaling import awq_terms, smooth_terms, total_loss
from jq.spec import QuantSpec
from jq.statistics import InputStats

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Scaling(NamedTuple):
    """A scale, and how it was chosen.

    scale: float32 [K], constant over channels that share one.
    choice: the exponent; NaN where no scaling was the best.
    """

    scale: jax.Array
    choice: jax.Array


def sample(stream: Stream, tokens: int) -> Stream:
    """The first samples of the stream, about `tokens` tokens and at least one sample."""
    count = max(1, tokens // stream.x.shape[1])
    return jax.tree.map(lambda a: a[:count], stream)


@functools.partial(
    jax.jit, static_argnames=("model", "kind", "index", "specs", "method", "axis_name")
)
def choose_scale(
    model: BlockwiseModel,
    kind: Hashable,
    index: int,
    params: Any,
    stream: Stream,
    stats: InputStats,
    *,
    specs: tuple[QuantSpec | None, ...],
    method: AWQ | SmoothQuant,
    real: Bool[Array, "B"] | None = None,
    axis_name: str | None = None,
) -> Scaling:
    """The scale for group `index` of a block in full precision.

    Args:
      params: the block's parameters.
      stream: sample of the group's input, as stage `index` gave it.
      stats: statistics of that input over all tokens.
      specs: format of each linear of the group; None where it stays in full precision.
      method: with its options.
      real, axis_name: inside `jax.shard_map`, `stream` is a device's share of the sample, of whose
        rows those count that are `real`; the scale is that of the whole, on every device.
    """
    group = model.linear_groups[index]
    total = _of_one if axis_name is None else functools.partial(lax.psum, axis_name=axis_name)
    weights = [tree.get(params, f"{linear}/kernel") for linear in group.linears]
    quantized = [(w, spec) for w, spec in zip(weights, specs, strict=True) if spec is not None]
    if isinstance(method, SmoothQuant):
        x_max, w_max = smooth_terms(group, weights, stats)
        if method.alpha != "auto":
            scale = smoothquant.smoothing_scale(method.alpha, x_max, w_max)
            return Scaling(scale, jnp.float32(method.alpha))
        loss = None
        if len(set(specs)) == 1:
            loss = _block_part_loss(
                model, kind, index, params, stream, real, specs, _smoothed_inputs
            )
        if loss is None:
            # One range for all of x, perhaps: each device looks at the whole sample.
            whole = stream if axis_name is None else lax.all_gather(stream, axis_name, tiled=True)
            loss, total = _linears_loss(quantized, whole), _of_one
        scale, alpha, _ = smoothquant.search_alpha(x_max, w_max, loss, total)
        return Scaling(scale, alpha)
    abs_mean, magnitude = awq_terms(group, quantized, stats, method)
    if not method.search_scale:
        scale = awq.scale_of(method.exponent, abs_mean, magnitude)
        return Scaling(scale, jnp.float32(method.exponent))
    loss = _block_part_loss(model, kind, index, params, stream, real, specs)
    if loss is None:
        quantized, shared = _own_outputs(quantized, axis_name)
        loss = total_loss([awq.gram_loss([w], stats.gram, spec) for w, spec in quantized])
        total = total if shared else _of_one
    scale, _, best = awq.search_scale(abs_mean, magnitude, loss, method.n_grid, total)
    return Scaling(scale, jnp.where(best == 0, jnp.nan, (best - 1) / method.n_grid))


def _own_outputs(
    quantized: Sequence[tuple[jax.Array, QuantSpec]], axis_name: str | None
) -> tuple[Sequence[tuple[jax.Array, QuantSpec]], bool]:
    """The device's part of the outputs of every weight; all where they share scales or do not
    divide.  The second value says which."""
    parts = 1 if axis_name is None else lax.axis_size(axis_name)
    apart = all(spec.granularity in ("group", "channel") for _, spec in quantized)
    if axis_name is None or not apart or any(w.shape[1] % parts for w, _ in quantized):
        return quantized, False
    place = lax.axis_index(axis_name)

    def own(w: jax.Array) -> jax.Array:
        size = w.shape[1] // parts
        return lax.dynamic_slice_in_dim(w, place * size, size, axis=1)

    return [(own(w), spec) for w, spec in quantized], True


def _of_one(losses: jax.Array) -> jax.Array:
    """The losses of a device that has seen the whole sample."""
    return losses


def _linears_loss(quantized: Sequence[Any], stream: Stream) -> Callable[[jax.Array], jax.Array]:
    """Squared error of the linears' own outputs on the sample."""
    x = jnp.asarray(stream.x).reshape(-1, stream.x.shape[-1])
    if stream.mask is not None:
        x = jnp.where(stream.mask.reshape(-1, 1), x, jnp.zeros((), x.dtype))
    return total_loss([smoothquant.output_loss([w], x, spec) for w, spec in quantized])


def _smoothed_inputs(x: jax.Array, scale: jax.Array, spec: QuantSpec) -> jax.Array:
    wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return smoothquant.effective_inputs(wide, scale, spec).reshape(x.shape).astype(x.dtype)


def _same_inputs(x: jax.Array, scale: jax.Array, spec: QuantSpec | None) -> jax.Array:
    return x


def _block_part_loss(
    model: BlockwiseModel,
    kind: Hashable,
    index: int,
    params: Any,
    stream: Stream,
    real: jax.Array | None,
    specs: Sequence[QuantSpec | None],
    inputs: Callable[[jax.Array, jax.Array, Any], jax.Array] = _same_inputs,
) -> Callable[[jax.Array], jax.Array] | None:
    """Squared error of the attention's or the MLP's output when this group is rounded.

    That is the error of the next group's input, seen through the next group's weights. `inputs`
    gives what a scale makes of this group's input.

    None for a group of one linear, whose output error the Gram matrix gives exactly and over all
    tokens.
    """
    groups = model.linear_groups
    if len(groups[index].linears) == 1 or index + 1 == len(groups):
        return None
    paths = [f"{linear}/kernel" for linear in groups[index].linears]
    weights = [tree.get(params, path) for path in paths]
    following = [tree.get(params, f"{linear}/kernel") for linear in groups[index + 1].linears]
    following = jnp.concatenate([w.astype(jnp.float32) for w in following], axis=1)

    def outputs(kernels: Sequence[jax.Array]) -> Callable[[Stream], jax.Array]:
        changed = params
        for path, kernel in zip(paths, kernels, strict=True):
            changed = tree.replace(changed, path, kernel)

        def run(part: Stream) -> jax.Array:
            one = jax.tree.map(lambda a: a[None], part)
            x, _ = model.block_stage(kind, index + 1, changed, one.x, one.carry, one.mask)
            x = x[0].astype(jnp.float32)
            return x if part.mask is None else jnp.where(part.mask[:, None], x, 0.0)

        return run

    targets = lax.map(outputs(weights), stream)

    def loss(scale: Float[Array, "K"]) -> jax.Array:
        kernels = [
            w if spec is None else grid.effective_weight(w, scale, spec)
            for w, spec in zip(weights, specs, strict=True)
        ]
        run = outputs(kernels)

        def add(total, part):
            target, sample, real = part
            sample = sample._replace(x=inputs(sample.x, scale, specs[0]))
            error = jnp.sum(jnp.square((run(sample) - target) @ following))
            return total + (error if real is None else jnp.where(real, error, 0.0)), None

        total, _ = lax.scan(add, jnp.float32(0), (targets, stream, real))
        return total

    return loss
