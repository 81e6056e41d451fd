"""Running one stage of a block over all calibration samples, in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jq import statistics
from jq.blockwise import BlockwiseModel
from jq.qtensor import QTensor
from jq.statistics import InputStats

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Stream(NamedTuple):
    """The calibration set on its way through a block.

    x: [samples, T, K], the input of the next group of linears.
    carry: whatever the stages hand on, leading axis samples.
    mask: bool [samples, T], True for real tokens; None when all are.
    """

    x: jax.Array
    carry: Any
    mask: jax.Array | None


class StageResult(NamedTuple):
    """What a stage gives.

    stream: its outputs.
    stats: statistics of `stream.x`, where asked for.
    finite: bool [samples], which outputs are free of NaN and infinities.
    """

    stream: Stream
    stats: InputStats | None
    finite: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "kind", "index", "collect", "batch_size"))
def run_stage(
    model: BlockwiseModel,
    kind: Hashable,
    index: int,
    params: Any,
    stream: Stream,
    *,
    collect: bool,
    batch_size: int,
) -> StageResult:
    """Run stage `index` on every sample, `batch_size` at a time.

    Statistics are added sample by sample, so the batch size does not change their order. Where
    activations have one scale per call, a call is one sample. Weights are brought to the
    activations' dtype once per call, not once per sample.
    """
    params = ready(params, stream.x.dtype)
    samples = stream.x.shape[0]
    if _scales_per_call(params):
        batch_size = 1
    if stream.mask is not None:
        # Padding must not decide about the scale of quantized activations either.
        x = jnp.where(stream.mask[:, :, None], stream.x, jnp.zeros((), stream.x.dtype))
        stream = stream._replace(x=x)
    batch = max(b for b in range(1, min(batch_size, samples) + 1) if samples % b == 0)
    batches = jax.tree.map(lambda a: a.reshape(-1, batch, *a.shape[1:]), stream)

    def step(stats, part: Stream):
        x, carry = model.block_stage(kind, index, params, part.x, part.carry, part.mask)
        if stats is not None:
            for i in range(batch):
                stats = statistics.update(stats, x[i], None if part.mask is None else part.mask[i])
        return stats, (x, carry, _finite(x, part.mask))

    stats = None
    if collect:
        x, _ = jax.eval_shape(
            lambda part: model.block_stage(kind, index, params, part.x, part.carry, part.mask),
            jax.tree.map(lambda a: a[0], batches),
        )
        stats = statistics.init(x.shape[-1])
    stats, outputs = lax.scan(step, stats, batches)
    x, carry, finite = jax.tree.map(lambda a: a.reshape(samples, *a.shape[2:]), outputs)
    if stats is not None:
        stats = statistics.finish(stats)
    return StageResult(Stream(x, carry, stream.mask), stats, finite)


def _finite(x: Float[Array, "B T K"], mask: Bool[Array, "B T"] | None) -> Bool[Array, "B"]:
    # Zero for finite numbers, NaN for all others: one sum tells.
    poison = x.astype(jnp.float32) * 0.0
    if mask is not None:
        poison = jnp.where(mask[:, :, None], poison, 0.0)
    return jnp.sum(poison, axis=(1, 2)) == 0


@jax.jit
def prepare_block(params: Any) -> tuple[Any, Any]:
    """A block ready for quantization: kernels in float32, and whether each leaf is finite."""

    def wide(path, leaf):
        return leaf.astype(jnp.float32) if _is_kernel(path) else leaf

    finite = jax.tree.map(lambda leaf: jnp.sum(leaf.astype(jnp.float32) * 0.0) == 0, params)
    return jax.tree_util.tree_map_with_path(wide, params), finite


def _scales_per_call(params: Any) -> bool:
    tensors = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    specs = [w.spec.activation for w in tensors if isinstance(w, QTensor)]
    return any(act and act.granularity == "tensor" and not act.static for act in specs)


def ready(params: Any, dtype: Any) -> Any:
    """Parameters with kernels in `dtype`: of plain arrays, and of weight-only QTensors, which are
    dequantized; those with 8-bit activations stay."""

    def plain(path, leaf):
        if isinstance(leaf, QTensor):
            return leaf.dequantize(dtype) if leaf.spec.activation is None else leaf
        return leaf.astype(dtype) if _is_kernel(path) else leaf

    return jax.tree_util.tree_map_with_path(
        plain, params, is_leaf=lambda leaf: isinstance(leaf, QTensor)
    )


def _is_kernel(path: Any) -> bool:
    return getattr(path[-1], "key", None) == "kernel"
