"""One group of linears that share an input: from weights and statistics to QTensors.

The linears are quantized side by side, as one matrix [K, N1 + N2 + ...]: outputs do not depend on
each other, so the Hessian is factored once and each shape compiles once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jq.methods.gptq import GPTQ, gptq_quantize
from jq.methods.rtn import RTN, rtn_quantize
from jq.methods.solution import Solution
from jq.qtensor import QTensor
from jq.spec import FP8_MAX, QuantSpec
from jq.statistics import InputStats

if TYPE_CHECKING:
    from jaxtyping import Array, Float


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


def round_group(
    weights: Sequence[jax.Array],
    stats: InputStats | None,
    spec: QuantSpec,
    rounding: RTN | GPTQ,
    scale: Float[Array, "K"] | None = None,
) -> tuple[tuple[QTensor, ...], GroupReport]:
    """Quantize the weights [K, N_i] of linears that share an input.

    Args:
      weights: any float dtype; their K agree and spec.group_size divides it.
      stats: statistics of the shared input; needed where `rounding.needs_statistics`, by static
        activations, and for the output errors.
      spec, rounding: format and method.
      scale: what was folded into the weights before (AWQ, SmoothQuant); only the report needs it.
    Returns: a QTensor per weight and the report.
    """
    sizes = tuple(w.shape[1] for w in weights)
    return _round_group(jnp.concatenate(weights, axis=1), stats, scale, sizes, spec, rounding)


@functools.partial(jax.jit, static_argnames=("sizes", "spec", "rounding"))
def _round_group(w, stats, scale, sizes, spec, rounding):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    damp, failed = jnp.float32(0), jnp.bool_(False)
    if spec.granularity in ("tensor", "block"):
        # Outputs share scales within a linear: linears must not see each other.
        parts = [
            _round(w[:, a : a + n], stats, spec, rounding)
            for a, n in zip(starts, sizes, strict=True)
        ]
        solutions = [part[0] for part in parts]
        damp = jnp.max(jnp.stack([part[1] for part in parts]))
        failed = jnp.any(jnp.stack([part[2] for part in parts]))
    else:
        whole, damp, failed = _round(w, stats, spec, rounding)
        solutions = [whole.columns(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    input_scale = static_input_scale(stats, spec)
    qtensors = tuple(s.to_qtensor(spec, input_scale=input_scale) for s in solutions)
    rounded = jnp.concatenate([s.dequantize(spec) for s in solutions], axis=1)
    report = _report(w.astype(jnp.float32), rounded, stats, scale, sizes, spec)
    return qtensors, report._replace(damp=damp, failed=failed)


def _round(w, stats, spec, rounding) -> tuple[Solution, jax.Array, jax.Array]:
    gram = None if stats is None else stats.gram
    if isinstance(rounding, GPTQ):
        solution, info = gptq_quantize(w, gram, spec, rounding)
        return solution, info.damp, info.failed
    return rtn_quantize(w, spec, rounding.clip, gram), jnp.float32(0), jnp.bool_(False)


def static_input_scale(stats: InputStats | None, spec: QuantSpec) -> jax.Array | None:
    """Scale of statically quantized activations: largest |x| of calibration over the largest code."""
    if spec.activation is None or not spec.activation.static:
        return None
    assert stats is not None, "static activations need calibration statistics"
    largest = jnp.max(stats.abs_max)
    top = FP8_MAX if spec.is_float else 127.0
    return jnp.where(largest > 0, largest / top, 1.0)


def _report(
    w: Float[Array, "K N"],
    rounded: Float[Array, "K N"],
    stats: InputStats | None,
    scale: Float[Array, "K"] | None,
    sizes: tuple[int, ...],
    spec: QuantSpec,
) -> GroupReport:
    weight_error = _per_linear_ratio(jnp.square(w - rounded), jnp.square(w), sizes)
    if stats is None:
        unknown = jnp.full((len(sizes),), jnp.nan)
        return GroupReport(weight_error, unknown, unknown, jnp.float32(0), jnp.bool_(False))
    if scale is None:
        nearest = rtn_quantize(w, spec).dequantize(spec)
    else:
        original = w / scale[:, None]
        nearest = rtn_quantize(original, spec).dequantize(spec) * scale[:, None]

    def energy(d: jax.Array) -> jax.Array:
        return d * jnp.matmul(stats.gram, d, precision=jax.lax.Precision.HIGHEST)

    total = energy(w)
    return GroupReport(
        weight_error,
        _per_linear_ratio(energy(w - rounded), total, sizes),
        _per_linear_ratio(energy(w - nearest), total, sizes),
        jnp.float32(0),
        jnp.bool_(False),
    )


def _per_linear_ratio(part: jax.Array, whole: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    ratios, start = [], 0
    for size in sizes:
        top, bottom = (jnp.sum(a[:, start : start + size]) for a in (part, whole))
        ratios.append(jnp.sqrt(jnp.maximum(top, 0.0) / jnp.where(bottom > 0, bottom, 1.0)))
        start += size
    return jnp.stack(ratios)
