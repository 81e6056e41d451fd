"""Rotary position embeddings and their context extensions.

Rotary embeddings: Su et al. 2021, "RoFormer", section 3.2, in the half-split layout of Llama
checkpoints: channel i is rotated together with channel i + head_dim/2.

A `RopeConfig` is data; `inverse_frequencies` turns it into numbers in float64, once, on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jq.errors import ModelError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of a model.

    Attributes:
        theta: base of the geometric progression of wavelengths.
        kind: how the context was extended beyond the pretrained one.
            `linear`: positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
            `dynamic`: NTK-aware base that grows with the sequence (bloc97 / emozilla 2023).
            `llama3`: long wavelengths divided by `factor`, short ones kept, a linear blend between.
            `yarn`: NTK-by-parts and an attention temperature (Peng et al. 2023, arXiv:2309.00071,
            sections 3.2 and 3.4).
        factor: the extension factor; 1 for `default`.
        original_max_position_embeddings: the pretrained context, where the kind needs it.
        low_freq_factor, high_freq_factor: `llama3` only.
        beta_fast, beta_slow, truncate: `yarn` only, the ramp's ends in rotations over the
            pretrained context, and whether they are rounded to whole channels.
        attention_factor, mscale, mscale_all_dim: `yarn` only; the factor on cos and sin is
            `attention_factor` where given, else it follows from the others.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ModelError(f"rope type {self.kind!r} is unknown; known: {', '.join(ROPE_KINDS)}")
        if self.theta <= 0 or self.factor <= 0:
            raise ModelError(
                f"rope needs theta > 0 and factor > 0, got {self.theta} and {self.factor}"
            )
        if (
            self.kind in ("dynamic", "llama3", "yarn")
            and self.original_max_position_embeddings is None
        ):
            raise ModelError(f"rope type {self.kind!r} needs original_max_position_embeddings")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ModelError(
                f"rope type 'llama3' needs low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each channel pair, float64 `[head_dim/2]`.

    For `dynamic` these are the values within the pretrained context.
    """
    base = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope.kind:
        case "default" | "dynamic":
            return base
        case "linear":
            return base / rope.factor
        case "llama3":
            return _llama3_frequencies(rope, base)
        case "yarn":
            return _yarn_frequencies(rope, base, head_dim)


def attention_scaling(rope: RopeConfig) -> float:
    """Factor on cos and sin: 1 but for `yarn` (section 3.4 of the paper, default 0.1 ln s + 1)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(
            rope.factor, rope.mscale_all_dim
        )
    return _yarn_mscale(rope.factor, 1.0)


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 `[B, T, head_dim/2]`, of integer positions `[B, T]`."""
    place = positions.astype(jnp.float32)[..., None]
    if rope.kind == "dynamic":
        angles = place * _dynamic_frequencies(rope, head_dim, positions)
    else:
        frequencies = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
        angles = place * frequencies[None, None]
    scale = attention_scaling(rope)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate `x` `[B, T, H, head_dim]` by tables `[B, T, head_dim/2]`, in float32; x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _llama3_frequencies(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    assert rope.original_max_position_embeddings is not None
    rotations = rope.original_max_position_embeddings * base / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return keep * base + (1 - keep) * base / rope.factor


def _yarn_frequencies(rope: RopeConfig, base: np.ndarray, head_dim: int) -> np.ndarray:
    assert rope.original_max_position_embeddings is not None
    context = rope.original_max_position_embeddings

    def channel(rotations: float) -> float:
        """Channel pair that turns so often over the pretrained context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolate = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return interpolate * base / rope.factor + (1 - interpolate) * base


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, positions: jax.Array) -> jax.Array:
    """`[B, 1, head_dim/2]`: the base grows with each row's own length, so rows stay independent."""
    assert rope.original_max_position_embeddings is not None
    context = rope.original_max_position_embeddings
    length = jnp.maximum(positions.max(axis=-1, keepdims=True) + 1, context).astype(jnp.float32)
    growth = rope.factor * length / context - (rope.factor - 1)
    exponent = np.arange(0, head_dim, 2) / head_dim
    log_theta = math.log(rope.theta) + jnp.log(growth) * (head_dim / (head_dim - 2))
    return jnp.exp(-log_theta[..., None] * jnp.asarray(exponent, jnp.float32)[None, None])
