"""Running one stage of a block over all calibration samples."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jq import statistics, tree
from jq.blockwise import BlockwiseModel
from jq.chunks import largest_divisor
from jq.qtensor import QTensor
from jq.statistics import InputStats

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Stream(NamedTuple):
    """The calibration set on its way through a block; NumPy arrays where it stays on the host.

    x: [samples, T, K], the input of the next group of linears.
    carry: whatever the stages hand on, leading axis samples.
    mask: bool [samples, T], True for real tokens; None when all are.
    """

    x: jax.Array | np.ndarray
    carry: Any
    mask: jax.Array | np.ndarray | None


class StageResult(NamedTuple):
    """What a stage gives.

    stream: its outputs.
    stats: statistics of `stream.x`, where asked for.
    finite: bool [samples], which outputs are free of NaN and infinities.
    """

    stream: Stream
    stats: InputStats | None
    finite: jax.Array | np.ndarray


def run_stage(
    model: BlockwiseModel,
    kind: Hashable,
    index: int,
    params: Any,
    stream: Stream,
    *,
    collect: bool,
    batch_size: int = 1,
) -> StageResult:
    """Run stage `index` on every sample, one after the other.

    One sample a time, so that neither the order of the sums nor the shape of any product depends on
    the batch size: results are the same bits. A stream of NumPy arrays stays in host memory; then
    `batch_size` samples are on the device while the next are on their way (the largest divisor of
    their number that is no larger, since every length is a program of its own).
    """
    samples = len(stream.x)
    stats = None
    if collect:
        first = model.linear_groups[index].linears[0]
        stats = statistics.init(tree.get(params, f"{first}/kernel").shape[-2])
    if not isinstance(stream.x, np.ndarray):
        result = run_samples(model, kind, index, params, stream, stats, samples)
        return result._replace(stats=_finished(result.stats))
    size = largest_divisor(samples, batch_size)
    whole, waiting = _Whole(samples), None
    for start in range(0, samples, size):
        chunk = jax.device_put(jax.tree.map(lambda a: a[start : start + size], stream))  # noqa: B023
        # Dispatch is asynchronous: this chunk is computed while the one before is fetched.
        part = run_samples(model, kind, index, params, chunk, stats, size)
        stats = part.stats
        if waiting is not None:
            whole.add(*waiting)
        waiting = start, (part.stream.x, part.stream.carry, part.finite)
    assert waiting is not None
    whole.add(*waiting)
    x, carry, finite = whole.arrays
    return StageResult(Stream(x, carry, stream.mask), _finished(stats), finite)


class _Whole:
    """Arrays in host memory that are filled part by part."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.arrays: Any = None

    def add(self, start: int, part: Any) -> None:
        part = jax.device_get(part)
        if self.arrays is None:
            self.arrays = jax.tree.map(
                lambda a: np.empty((self.samples, *a.shape[1:]), a.dtype), part
            )
        for whole, some in zip(jax.tree.leaves(self.arrays), jax.tree.leaves(part), strict=True):
            whole[start : start + len(some)] = some


@functools.partial(jax.jit, static_argnames=("model", "kind", "index"))
def run_samples(model, kind, index, params, stream, stats, count) -> StageResult:
    """The stage on the first `count` samples, which are all; statistics are added to `stats`.

    XLA does not know the count, and cannot fit the loop to it: its body is the same program for any
    number of samples, and rounds the same way.  Of an array of one sample it would know the index:
    such a sample stands there twice.
    """
    samples = len(stream.x)
    if samples == 1:
        stream = jax.tree.map(lambda a: jnp.concatenate([a, a]), stream)
    params = ready(params, stream.x.dtype)
    if stream.mask is not None:
        # Padding must not decide about the scale of quantized activations either.
        x = jnp.where(stream.mask[:, :, None], stream.x, jnp.zeros((), stream.x.dtype))
        stream = stream._replace(x=x)

    def run(sample: Stream):
        one = jax.tree.map(lambda a: a[None], sample)
        x, carry = model.block_stage(kind, index, params, one.x, one.carry, one.mask)
        finite = _finite(x, one.mask)
        return jax.tree.map(lambda a: a[0], (x, carry, finite))

    def step(i, state):
        stats, outputs = state
        sample = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), stream)
        made = run(sample)
        if stats is not None:
            stats = statistics.update(stats, made[0], sample.mask)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
        return stats, jax.tree.map(put, outputs, made)

    shapes = jax.eval_shape(run, jax.tree.map(lambda a: a[0], stream))
    outputs = jax.tree.map(lambda a: jnp.zeros((len(stream.x), *a.shape), a.dtype), shapes)
    stats, outputs = lax.fori_loop(0, count, step, (stats, outputs))
    x, carry, finite = jax.tree.map(lambda a: a[:samples], outputs)
    mask = None if stream.mask is None else stream.mask[:samples]
    return StageResult(Stream(x, carry, mask), stats, finite)


@jax.jit
def _finished(stats: InputStats | None) -> InputStats | None:
    return None if stats is None else statistics.finish(stats)


def _finite(x: Float[Array, "B T K"], mask: Bool[Array, "B T"] | None) -> Bool[Array, "B"]:
    # Zero for finite numbers, NaN for all others: one sum tells.
    poison = x.astype(jnp.float32) * 0.0
    if mask is not None:
        poison = jnp.where(mask[:, :, None], poison, 0.0)
    return jnp.sum(poison, axis=(1, 2)) == 0


@functools.partial(jax.jit, static_argnames="dtype")
def prepare_block(params: Any, dtype: Any) -> tuple[Any, Any]:
    """A block ready for quantization: kernels in `dtype` (None: as they are), and whether each leaf
    is finite."""

    def cast(path, leaf):
        return leaf if dtype is None or not _is_kernel(path) else leaf.astype(dtype)

    finite = jax.tree.map(lambda leaf: jnp.sum(leaf.astype(jnp.float32) * 0.0) == 0, params)
    return jax.tree_util.tree_map_with_path(cast, params), finite


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
