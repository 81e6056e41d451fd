"""One group of linears that share an input: from weights and statistics to QTensors.

The linears are quantized side by side, as one matrix [K, N1 + N2 + ...]: outputs do not depend on
each other, so the Hessian is factored once and each shape compiles once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jq import statistics
from jq.errors import CalibrationError
from jq.methods.gptq import GPTQ, factor_hessian, gptq_solve
from jq.methods.rtn import RTN, rtn_quantize
from jq.methods.solution import Solution
from jq.qtensor import QTensor
from jq.spec import FP8_MAX, QuantSpec
from jq.statistics import InputStats

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# So many outputs of a group's linears are compared with what they were at a time.
OUTPUTS = 512


class GroupReport(NamedTuple):
    """How the rounding went; arrays with one entry per linear unless said otherwise.

    weight_error: ||W - Q|| / ||W||.
    output_error: relative error of the outputs on the calibration tokens,
      sqrt(tr(D' H D) / tr(W' H W)); NaN without statistics.
    rtn_output_error: the same for rounding the weights to nearest before any scale was folded in.
    damp: scalar, the damping fraction GPTQ used (0 for others), the largest of the linears'.
    failed: scalar bool, GPTQ fell back to rounding to nearest, for any of the linears.
    """

    weight_error: jax.Array
    output_error: jax.Array
    rtn_output_error: jax.Array
    damp: jax.Array
    failed: jax.Array


class RoundedGroup(NamedTuple):
    """A group of linears after rounding.

    qtensors: one per linear.
    kernels: float32 [K, N_i], what they dequantize to.
    report: how it went.
    """

    qtensors: tuple[QTensor, ...]
    kernels: tuple[jax.Array, ...]
    report: GroupReport


def round_group(
    weights: Sequence[jax.Array],
    stats: InputStats | None,
    spec: QuantSpec,
    rounding: RTN | GPTQ,
    scale: Float[Array, "K"] | None = None,
) -> RoundedGroup:
    """Quantize the weights [K, N_i] of linears that share an input.

    Args:
      weights: any float dtype; their K agree and spec.group_size divides it.
      stats: statistics of the shared input; needed where `rounding.needs_statistics`, by static
        activations, and for the output errors.
      spec, rounding: format and method.
      scale: what was folded into the weights before (AWQ, SmoothQuant); only the report needs it.
    Returns: a QTensor and a dequantized kernel per weight, and the report.
    """
    hessian = None
    if isinstance(rounding, GPTQ):
        # Apart from the rest, because it compiles once for all weights with as many inputs.
        hessian = factor_hessian(_gram(stats), spec, rounding)
    return solve_group(tuple(weights), stats, hessian, scale, spec, rounding)


@functools.partial(jax.jit, static_argnames=("spec", "rounding", "axis_name"))
def solve_group(weights, stats, hessian, scale, spec, rounding, axis_name=None) -> RoundedGroup:
    """`round_group` with the Hessian already factored; None where the rounding needs none.

    axis_name: inside `jax.shard_map`, the mesh axis over whose devices the outputs of each weight
      are cut: results are those of the shards, the report that of the whole.
    """
    widths = [w.shape[1] for w in weights]
    w = jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1)
    if _shares_outputs(spec):
        parts = [_round(part, stats, hessian, spec, rounding) for part in _split(w, widths)]
        solutions = [part[0] for part in parts]
        damp = jnp.max(jnp.stack([part[1] for part in parts]))
        failed = jnp.any(jnp.stack([part[2] for part in parts]))
        q = jnp.concatenate([s.dequantize(spec) for s in solutions], axis=1)
    else:
        whole, damp, failed = _round(w, stats, hessian, spec, rounding)
        ends = itertools.accumulate(widths)
        solutions = [whole.columns(end - n, end) for n, end in zip(widths, ends, strict=True)]
        q = whole.dequantize(spec)
    input_scale = static_input_scale(stats, spec)
    qtensors = tuple(s.to_qtensor(spec, input_scale=input_scale) for s in solutions)
    report = _report(w, q, widths, stats, scale, spec, damp, failed, axis_name)
    return RoundedGroup(qtensors, tuple(_split(q, widths)), report)


def _shares_outputs(spec: QuantSpec) -> bool:
    """Whether outputs share scales within a linear: then linears must not see each other."""
    return spec.granularity in ("tensor", "block")


def _split(w: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    return jnp.split(w, np.cumsum(widths)[:-1], axis=1)


def _round(w, stats, hessian, spec, rounding) -> tuple[Solution, jax.Array, jax.Array]:
    if isinstance(rounding, GPTQ):
        solution, info = gptq_solve(w, hessian, spec, rounding)
        return solution, info.damp, info.failed
    gram = _gram(stats) if rounding.needs_statistics else None
    return rtn_quantize(w, spec, rounding.clip, gram), jnp.float32(0), jnp.bool_(False)


def _gram(stats: InputStats | None) -> jax.Array:
    if stats is None:
        raise CalibrationError("this method needs statistics of the weights' inputs, and has none")
    return stats.gram


def static_input_scale(stats: InputStats | None, spec: QuantSpec) -> jax.Array | None:
    """Scale of static activations: largest |x| of calibration over the largest code."""
    if spec.activation is None or not spec.activation.static:
        return None
    assert stats is not None, "static activations need calibration statistics"
    largest = jnp.max(stats.abs_max)
    top = FP8_MAX if spec.is_float else 127.0
    return jnp.where(largest > 0, largest / top, 1.0)


def _report(
    w: Float[Array, "K N"],
    q: Float[Array, "K N"],
    widths: Sequence[int],
    stats: InputStats | None,
    scale: Float[Array, "K"] | None,
    spec: QuantSpec,
    damp: jax.Array,
    failed: jax.Array,
    axis_name: str | None,
) -> GroupReport:
    # [outputs, linears]: which output is whose.  Sums over outputs are products with it.
    owner = jnp.repeat(jnp.eye(len(widths)), np.array(widths), axis=0)
    energy = _whole(jnp.sum(jnp.square(jnp.stack([w - q, w])), axis=1) @ owner, axis_name)
    weight_error = _ratio(energy[0], energy[1])
    if stats is None:
        unknown = jnp.full((len(widths),), jnp.nan)
        return GroupReport(weight_error, unknown, unknown, damp, failed)
    energy = _whole(_output_energies(stats.gram, w, q, widths, scale, spec) @ owner, axis_name)
    return GroupReport(
        weight_error, _ratio(energy[0], energy[1]), _ratio(energy[2], energy[1]), damp, failed
    )


def _output_energies(
    gram: Float[Array, "K K"],
    w: Float[Array, "K N"],
    q: Float[Array, "K N"],
    widths: Sequence[int],
    scale: Float[Array, "K"] | None,
    spec: QuantSpec,
) -> Float[Array, "3 N"]:
    """Output energies of w - q, w and w - (w to nearest), some outputs at a time: what is compared
    would else be most of a run's memory."""
    n = w.shape[1]
    size = min(n, OUTPUTS)
    parts = [w, q]
    if _shares_outputs(spec):
        parts.append(jnp.concatenate([_nearest(p, scale, spec) for p in _split(w, widths)], axis=1))

    def of(w: jax.Array, q: jax.Array, nearest: jax.Array | None = None) -> jax.Array:
        nearest = _nearest(w, scale, spec) if nearest is None else nearest
        errors = jnp.concatenate([w - q, w, w - nearest], axis=1)
        return statistics.output_energy(gram, errors).reshape(3, -1)

    def add(step: jax.Array, found: jax.Array) -> jax.Array:
        # The last ones begin early enough to be as many, and some are looked at twice.
        start = jnp.minimum(step * size, n - size)
        some = of(*(lax.dynamic_slice_in_dim(part, start, size, axis=1) for part in parts))
        return lax.dynamic_update_slice_in_dim(found, some, start, axis=1)

    if size == n:
        return of(*parts)
    return lax.fori_loop(0, -(-n // size), add, jnp.zeros((3, n), jnp.float32))


def _nearest(w: jax.Array, scale: Float[Array, "K"] | None, spec: QuantSpec) -> jax.Array:
    """The weights rounded to nearest, as they were before `scale` was folded in."""
    factor = jnp.float32(1) if scale is None else scale[:, None]
    return rtn_quantize(w / factor, spec).dequantize(spec) * factor


def _whole(energy: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum over the devices that hold the outputs."""
    return energy if axis_name is None else lax.psum(energy, axis_name)


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(part, 0.0) / jnp.where(whole > 0, whole, 1.0))
