"""Round to nearest: the baseline, and the rounding of methods that only move the weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jq import grid
from jq.methods import clip
from jq.methods.solution import Solution
from jq.spec import QuantSpec

Clip = Literal["none", "mse", "output"]


@dataclasses.dataclass(frozen=True)
class RTN:
    """Round every weight to the nearest point of its group's grid.

    clip: "none" takes the group's full range; "mse" the range with the least squared weight error;
      "output" the range with the least squared error of the group's part of the output on
      calibration inputs, whose statistics it needs.
    """

    clip: Clip = "none"

    @property
    def needs_statistics(self) -> bool:
        return self.clip == "output"


@functools.partial(jax.jit, static_argnames=("spec", "clip_kind"))
def rtn_quantize(
    w: jax.Array, spec: QuantSpec, clip_kind: Clip = "none", gram: jax.Array | None = None
) -> Solution:
    """Quantize a weight [K, N] to the nearest grid points.

    Args:
      w: any float dtype [K, N].
      spec: the format; its group_size divides K.
      clip_kind: see `RTN`.
      gram: float32 [K, K], sum of x x' over the calibration tokens; for clip_kind="output".
    """
    k, n = w.shape
    groups = grid.split_groups(w.astype(jnp.float32), spec)
    blocks = None
    if clip_kind == "output":
        assert gram is not None, "clip='output' needs the Gram matrix of the inputs"
        blocks = clip.gram_blocks(gram, groups.shape[0])
    lo, hi = weight_range(groups, spec, clip_kind, blocks)
    scale, zero = grid.scale_and_zero(lo, hi, spec)
    codes = grid.encode(groups, scale, zero, spec).reshape(k, n)
    return Solution(codes, scale[:, 0], zero[:, 0])


def weight_range(
    groups: jax.Array, spec: QuantSpec, clip_kind: Clip, blocks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Range [G, 1, N] of each group [G, g, N] after the clip search that was asked for.

    blocks: [G, g, g], the Gram matrix of each group's inputs, for "output".
    """
    lo, hi = grid.weight_range(groups, spec)
    if clip_kind == "none":
        return lo, hi
    if clip_kind == "mse":
        return clip.search_range(groups, lo, hi, spec, clip.squared_error(None))
    assert blocks is not None
    return clip.search_range(groups, lo, hi, spec, clip.output_error(blocks))
