"""The quantization grid: from a range of weights to scale and zero point, to codes, and back.

One owner of the rounding rules.  Everything is float32 array maths over weights in groups `[G, g,
N]` (groups, inputs in a group, outputs); scales and zero points are `[G, 1, N]` float32 and
broadcast.

Integer grid: w = (q - z) * s with q in [0, 2**b - 1].  Symmetric: z = 2**(b-1) and s = 2 * max|w| /
(2**b - 1), so that both ends of the range are off by at most half a step.  Asymmetric: s = (hi -
lo) / (2**b - 1), z = round(-lo / s), with the range widened to hold zero.  float8: s = max|w| /
448.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jq.spec import FP8_MAX, QuantSpec

# All-zero groups get this scale: codes are then the zero point and the weights come back as exact
# zeros.
_UNIT_SCALE = 1.0


def split_groups(w: jax.Array, spec: QuantSpec) -> jax.Array:
    """[K, N] -> [G, g, N] (one group of all K inputs for per-channel, per-tensor granularity)."""
    k, n = w.shape
    groups = spec.num_groups(k)
    return w.reshape(groups, k // groups, n)


def round_scale(scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """Round a float32 scale to what storage keeps, never to zero, infinity or NaN."""
    info = jnp.finfo(jnp.dtype(spec.scale_dtype))
    smallest = jnp.float32(max(float(info.smallest_subnormal), 1e-30))
    clipped = jnp.clip(scale, smallest, jnp.float32(min(float(info.max), 1e30)))
    return clipped.astype(spec.scale_dtype).astype(jnp.float32)


def weight_range(groups: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """(lo, hi) of each group, `[G, 1, N]`; outputs that share a scale get the same.

    The range always contains zero; for symmetric grids lo = -hi.
    """
    lo = jnp.minimum(groups.min(axis=1, keepdims=True), 0.0)
    hi = jnp.maximum(groups.max(axis=1, keepdims=True), 0.0)
    lo, hi = over_shared_outputs(lo, spec, jnp.min), over_shared_outputs(hi, spec, jnp.max)
    if spec.symmetric:
        hi = jnp.maximum(-lo, hi)
        lo = -hi
    return lo, hi


def over_shared_outputs(x: jax.Array, spec: QuantSpec, reduce) -> jax.Array:
    """Reduce [G, 1, N] over the outputs that share a scale; every output gets its set's value."""
    g, _, n = x.shape
    if spec.granularity not in ("tensor", "block"):
        return x
    width = n if spec.granularity == "tensor" else spec.group_size
    sets = x.reshape(g, 1, n // width, width)
    return jnp.broadcast_to(reduce(sets, axis=-1, keepdims=True), sets.shape).reshape(g, 1, n)


def scale_and_zero(lo: jax.Array, hi: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Grid of a range: float32 (scale, zero) of lo's shape; zero is integral (0 for float8)."""
    if spec.is_float:
        scale = _positive((hi - lo) / 2 / FP8_MAX)
        return round_scale(scale, spec), jnp.zeros_like(scale)
    top = 2**spec.bits - 1
    scale = round_scale(_positive((hi - lo) / top), spec)
    if spec.symmetric:
        return scale, jnp.full_like(scale, spec.zero_offset)
    return scale, jnp.clip(jnp.round(-lo / scale), 0, top)


def _positive(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, _UNIT_SCALE)


def encode(w: jax.Array, scale: jax.Array, zero: jax.Array, spec: QuantSpec) -> jax.Array:
    """Nearest codes: uint8 in [0, 2**bits - 1], or float8_e4m3fn."""
    if spec.is_float:
        return jnp.clip(w / scale, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    return _nearest(w, scale, zero, spec).astype(jnp.uint8)


def decode(codes: jax.Array, scale: jax.Array, zero: jax.Array, spec: QuantSpec) -> jax.Array:
    """float32 weights of codes."""
    q = codes.astype(jnp.float32)
    return q * scale if spec.is_float else (q - zero) * scale


def fake_quantize(w: jax.Array, scale: jax.Array, zero: jax.Array, spec: QuantSpec) -> jax.Array:
    """decode(encode(w)) without the narrow intermediate."""
    if spec.is_float:
        return decode(encode(w, scale, zero, spec), scale, zero, spec)
    return (_nearest(w, scale, zero, spec) - zero) * scale


def effective_weight(w: jax.Array, scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """What unscaled inputs see of a weight [K, N] whose inputs are scaled by [K]: Q(s W) / s,
    rounded to nearest over the full range; float32."""
    groups = split_groups(w.astype(jnp.float32) * scale[:, None], spec)
    step, zero = scale_and_zero(*weight_range(groups, spec), spec)
    return fake_quantize(groups, step, zero, spec).reshape(w.shape) / scale[:, None]


def _nearest(w: jax.Array, scale: jax.Array, zero: jax.Array, spec: QuantSpec) -> jax.Array:
    return jnp.clip(jnp.round(w / scale) + zero, 0, 2**spec.bits - 1)
