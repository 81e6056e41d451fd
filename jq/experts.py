"""Mixture of experts: linears [E, K, N] of a layer's E experts, each quantized on its own tokens.

Every expert has a Hessian of the tokens that were routed to it; all are factored and solved side by
side (`jax.vmap`).  A router gives its experts unequal shares, and some next to nothing: a Hessian
of fewer tokens than inputs leaves directions unseen in which rounding may err at will.  An expert
with fewer than `min_tokens` therefore borrows the missing ones (see `Experts`); one with enough is
solved to the same codes as if it stood alone.

Other tools round such experts to nearest, or send every token through every expert while they
calibrate.  The first forgets what was seen, the second weighs tokens that the router never sends as
much as those it does.  Output errors on held-out tokens of each expert, 3 bits, 64 inputs, eight
experts (the mean of six problems; `tests/jq/test_experts.py` has the like):

    tokens it saw                    0      16      64     128     512
    rounding to nearest          0.173   0.171   0.174   0.171   0.173
    GPTQ, its own tokens         0.173   0.239   0.197   0.165   0.152
    GPTQ, every expert's         0.166   0.166   0.166   0.161   0.160
    GPTQ, borrowing ("layer")    0.166   0.163   0.161   0.155   0.152
    GPTQ, borrowing ("white")    0.173   0.170   0.170   0.162   0.152
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jq import statistics
from jq.errors import SpecError
from jq.group import GroupReport, round_group
from jq.matmul import qmatmul
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.qtensor import QTensor
from jq.spec import QuantSpec
from jq.statistics import InputStats

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32

Prior = Literal["layer", "white"]


@dataclasses.dataclass(frozen=True)
class Experts:
    """What an expert that saw few tokens learns from instead.

    prior: whose tokens it borrows.  "layer": the average token of all experts of the layer, for
      linears that read the layer's hidden states (gate, up), as all experts do.  "white": inputs
      that are independent and of equal power, the expert's own, which draw GPTQ towards rounding to
      nearest; for linears whose input channels are the expert's own (down), of which other experts'
      tokens say nothing.
    min_tokens: an expert with n tokens borrows min_tokens - n of them, if that is positive.  None
      is four times as many as the linear has inputs: as many as inputs fill a Hessian, but it is
      twice as many before its rounding gets better than to nearest.
    at_a_time: experts solved side by side; the rest wait, and memory is that of so many.
    """

    prior: Prior = "white"
    min_tokens: int | None = None
    at_a_time: int = 8

    def __post_init__(self) -> None:
        if self.prior not in ("layer", "white"):
            raise SpecError(f"prior {self.prior!r} is neither 'layer' nor 'white'")
        if self.min_tokens is not None and self.min_tokens < 0:
            raise SpecError(f"min_tokens {self.min_tokens} is negative")
        if self.at_a_time < 1:
            raise SpecError(f"at_a_time {self.at_a_time} is not positive")


class ExpertsReport(NamedTuple):
    """How the rounding of a layer's experts went; leading axis E.

    tokens: float32 [E], tokens that were routed to each expert.
    borrowed: float32 [E], tokens that it borrowed.
    group: a `GroupReport` of each, against the tokens it has, borrowed ones included.
    """

    tokens: jax.Array
    borrowed: jax.Array
    group: GroupReport


def init(experts: int, k: int) -> InputStats:
    """Statistics of no tokens: an `InputStats` with a leading axis E."""
    empty = statistics.init(k)
    return jax.tree.map(lambda a: jnp.zeros((experts, *a.shape), a.dtype), empty)


def update(
    stats: InputStats, x: Float[Array, "E C K"], mask: Bool[Array, "E C"] | None = None
) -> InputStats:
    """Add tokens that were dispatched to experts in buffers of C places.

    mask: True where a place holds a token; None takes every row that is not all zeros, as buffers
      are that nothing was written to.
    Only the upper triangles are kept up to date: call `finish` at the end.
    """
    if mask is None:
        mask = jnp.any(x != 0, axis=-1)
    return jax.vmap(statistics.update)(stats, x, mask)


def update_routed(
    stats: InputStats,
    rows: Float[Array, "R K"],
    expert: Int32[Array, "R"],
    *,
    tile: int = 256,
) -> InputStats:
    """Add rows that each went to one expert, without buffers: a token of k experts is k rows.

    Rows are sorted by expert and taken in tiles that hold rows of one expert only, so that the work
    is that of the rows, and at most one tile more per expert.

    Args:
      stats: see `init`.
      rows: inputs of the experts.
      expert: who reads each, in [0, E); a row with any other number is left out.
      tile: rows at a time.
    """
    experts, total = stats.count.shape[0], rows.shape[0]
    known = (expert >= 0) & (expert < experts)
    expert = jnp.where(known, expert, experts)
    order = jnp.argsort(expert, stable=True)
    counts = jnp.bincount(expert, length=experts)
    tiles = -(-counts // tile)
    last_tile, first_row = jnp.cumsum(tiles), jnp.cumsum(counts) - counts

    def add(number, stats):
        which = jnp.searchsorted(last_tile, number, side="right")
        within = (number - (last_tile - tiles)[which]) * tile + jnp.arange(tile)
        places = jnp.minimum(first_row[which] + within, total - 1)
        one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, which, keepdims=False), stats)
        one = statistics.update(one, rows[order[places]], within < counts[which])
        put = functools.partial(lax.dynamic_update_index_in_dim, index=which, axis=0)
        return jax.tree.map(put, stats, one)

    return lax.fori_loop(0, last_tile[-1], add, stats)


def finish(stats: InputStats) -> InputStats:
    """Fill in the lower triangles of the Gram matrices."""
    return jax.vmap(statistics.finish)(stats)


def borrow(stats: InputStats, experts: Experts) -> tuple[InputStats, Float[Array, "E"]]:
    """Statistics in which every expert has tokens enough, and how many each has borrowed.

    `count` stays what it was, and so does everything of an expert that borrows nothing.
    """
    k = stats.abs_sum.shape[-1]
    enough = 4 * k if experts.min_tokens is None else experts.min_tokens
    missing = jnp.maximum(enough - stats.count, 0.0)
    total = jnp.maximum(jnp.sum(stats.count), 1.0)
    if experts.prior == "layer":
        lent = jnp.sum(stats.gram, axis=0)[None] / total
        spread = jnp.sum(stats.abs_sum, axis=0)[None] / total
        largest = jnp.max(stats.abs_max, axis=0)[None]
    else:
        power = jnp.trace(stats.gram, axis1=1, axis2=2) / k
        own = power / jnp.maximum(stats.count, 1.0)
        every = jnp.sum(power) / total
        own = jnp.where(own > 0, own, jnp.where(every > 0, every, 1.0))
        lent = own[:, None, None] * jnp.eye(k)[None]
        spread = jnp.sqrt(own)[:, None] * jnp.ones((1, k))
        largest = spread
    borrows = missing > 0
    gram = stats.gram + missing[:, None, None] * lent
    abs_sum = stats.abs_sum + missing[:, None] * spread
    return (
        InputStats(
            jnp.where(borrows[:, None, None], gram, stats.gram),
            jnp.where(borrows[:, None], abs_sum, stats.abs_sum),
            jnp.where(borrows[:, None], jnp.maximum(stats.abs_max, largest), stats.abs_max),
            stats.count,
        ),
        missing,
    )


@functools.partial(jax.jit, static_argnames=("spec", "rounding", "experts"))
def round_experts(
    weights: Sequence[jax.Array],
    stats: InputStats | None,
    spec: QuantSpec,
    rounding: RTN | GPTQ,
    experts: Experts,
) -> tuple[tuple[QTensor, ...], ExpertsReport]:
    """Quantize the weights [E, K, N_i] of experts' linears that share an input.

    Args:
      weights: any float dtype; E and K agree, and spec.group_size divides K.
      stats: statistics of each expert's input, leading axis E; needed where the rounding needs
        statistics, and for the output errors.
      spec, rounding: format and method, the same for all experts.
      experts: what becomes of those with few tokens.
    Returns: a QTensor [E, K, N_i] per weight, and the report.
    Raises: CalibrationError without statistics for a method that learns from them.
    """
    count = weights[0].shape[0]
    tokens = borrowed = jnp.zeros((count,), jnp.float32)
    if stats is not None:
        tokens = stats.count
        stats, borrowed = borrow(stats, experts)

    def one(given):
        weights, stats = given
        made = round_group(weights, stats, spec, rounding)
        return made.qtensors, made.report

    size = min(experts.at_a_time, count)
    qtensors, report = lax.map(one, (tuple(weights), stats), batch_size=size)
    return qtensors, ExpertsReport(tokens, borrowed, report)


def expert_matmul(
    x: Float[Array, "E *B K"], w: Float[Array, "E K N"] | QTensor
) -> Float[Array, "E *B N"]:
    """y[e] = x[e] @ w[e] for plain or quantized weights of experts; see `jq.qmatmul`."""
    return jax.vmap(qmatmul)(x, w)
