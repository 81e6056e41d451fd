"""Activations times an int4 weight, on Ampere and Ada.

A block of one warpgroup computes `block_m` rows and 64 or 128 columns as y^T = w^T x^T: the packed
weight is the A operand of mma.m16n8k16 as it is that of wgmma, dequantized in registers.  Scales
come straight from global memory, a stage ahead.  With `split` the blocks of a tile share its inputs
and leave float32 sums for XLA to add, in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jq.pallas_kernels import dequant
from jq.pallas_kernels.ampere import pipeline
from jq.pallas_kernels.ampere.config import Sizes, W4Config
from jq.pallas_kernels.ampere.tuning import choose_w4, unsuitable_w4
from jq.pallas_kernels.compat import ROWS, WORDS, pl, plgpu, swizzled
from jq.pallas_kernels.weight import W4Weight

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call; m is a multiple of block_m, n of block_n, k of a stage's inputs."""

    config: W4Config
    fmt: dequant.Format
    m: int
    n: int
    k: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.m // self.config.block_m, self.n // self.config.block_n

    @property
    def inputs(self) -> int:
        """Of a stage."""
        return 64 * self.config.slices

    @property
    def steps(self) -> int:
        return self.k // self.inputs

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.config.stages, copies=1 + self.config.tiles)

    @property
    def rows(self) -> int:
        """Of scales in a stage."""
        return dequant.rows_per_stage(self.fmt, self.inputs)

    @property
    def swizzle(self) -> int:
        """Of x: a copy takes at least four tiles of 8 rows x swizzle bytes."""
        return 64 if self.config.block_m == 16 and self.config.slices == 1 else 128

    @property
    def out_swizzle(self) -> int:
        config = self.config
        if config.split > 1:
            return min(128, 4 * config.block_m)
        return 64 if config.block_m == 16 and config.tiles == 1 else 128


def w4a16_ampere(
    x: Float[Array, "M K"],
    w: W4Weight,
    *,
    config: W4Config | None = None,
    compute_capability: tuple[int, int] = (8, 0),
) -> Float[Array, "M N"]:
    """y = x @ w, rounded once to x's dtype (`jq.pallas_kernels.w4a16.w4a16` checks and reshapes).

    Args:
      x: `w.dtype` [M, K], one row or more.
      w: the weight, of logical shape [K, N].
      config: tile sizes; None: the fastest estimated for the shape (see `tuning`).
      compute_capability: (8, 0), (8, 6) or (8, 9).
    Returns: `w.dtype` [M, N]; sums are float32, in an order that depends on the config alone.
    Raises: ValueError for a config that does not suit the weight or the device.
    """
    m = x.shape[0]
    config = config or choose_w4(m, w.k, w.n, w.symmetric, compute_capability)
    if reason := unsuitable_w4(config, w.k, w.n, compute_capability):
        raise ValueError(reason)
    return multiply(pipeline.padded(x, config.block_m), w, config)[:m]


def multiply(x: jax.Array, w: W4Weight, config: W4Config) -> jax.Array:
    """x [M, K] @ w [K, N] -> [M, N] in x's dtype; sizes are multiples of the config's."""
    product = launch(x, w, config)
    if config.split == 1:
        return product
    return (jnp.sum(product, 0).T * w.normaliser[None, :]).astype(x.dtype)


def launch(x: jax.Array, w: W4Weight, config: W4Config) -> jax.Array:
    """The kernel alone: the product, or each part's sums, float32 [split, N, M]."""
    fmt = dequant.Format(w.dtype, w.group_size, w.symmetric)
    plan = Plan(config, fmt, x.shape[0], w.n, w.k)
    split = config.split > 1
    sums = jax.ShapeDtypeStruct((config.split, plan.n, plan.m), jnp.float32)
    inputs = [x, w.fragments, w.normaliser, w.scale]
    if w.offset is not None:
        inputs.append(w.offset)
    return plgpu.kernel(
        functools.partial(kernel, plan),
        out_type=sums if split else jax.ShapeDtypeStruct((plan.m, plan.n), x.dtype),
        scratch_types=_shared_memory(plan),
        grid=(config.split, math.prod(plan.grid)),
        grid_names=("part", "tile"),
        compiler_params=pipeline.COMPILER,
        kernel_name=f"w4a16_ampere_{config.name}_{fmt.name}",
    )(*inputs)


def _shared_memory(plan: Plan) -> dict:
    """What is copied and, when that is done with, what is stored."""
    config, dtype = plan.config, jnp.dtype(plan.fmt.dtype)
    if config.split > 1:
        out = (config.block_n, config.block_m), jnp.float32
    else:
        out = (config.block_m, config.block_n), dtype
    x_s = swizzled((config.stages, config.block_m, plan.inputs), dtype, plan.swizzle)
    w_s = plgpu.SMEM((config.stages, config.tiles, config.slices, 4, 128), jnp.int32)
    return {"shared": plgpu.RefUnion((x_s, w_s), swizzled(*out, plan.out_swizzle))}


def kernel(plan: Plan, x, w, normaliser, scale, *rest, shared) -> None:
    """What a block does."""
    offset, out = (None, rest[0]) if plan.fmt.symmetric else rest
    (x_s, w_s), out_s = shared
    config, fmt = plan.config, plan.fmt
    dtype = jnp.dtype(fmt.dtype)
    part = lax.axis_index("part")
    m, n = plgpu.planar_snake(lax.axis_index("tile"), plan.grid, 0, config.snake)
    first_m, first_n = m * config.block_m, n * config.block_n
    first, end = pipeline.share(part, config.split, plan.steps)

    def issue(stage, slot):
        for t in range(config.tiles):
            tiles = w.at[n * config.tiles + t, pl.ds(stage * config.slices, config.slices)]
            pipeline.copy(tiles, w_s.at[slot, t])
        rows = pl.ds(first_m, config.block_m)
        pipeline.copy(x.at[rows, pl.ds(stage * plan.inputs, plan.inputs)], x_s.at[slot])

    def rows_of(array, stage):
        """[tile][row of the stage's scales or offsets]: 64 values each."""
        if array is None:
            return [[] for _ in range(config.tiles)]
        row = dequant.first_row(fmt, stage * plan.inputs)
        columns = [pl.ds(first_n + 64 * t, 64) for t in range(config.tiles)]
        return [
            [
                plgpu.load(array.at[row + r, c], layout=ROWS, optimized=False)
                for r in range(plan.rows)
            ]
            for c in columns
        ]

    def scales_of(stage):
        return rows_of(scale, stage), rows_of(offset, stage)

    def step(stage, slot, carry):
        sums, (scales, offsets) = carry
        sums = list(sums)
        # A scale of a whole column stays; others arrive while this stage is multiplied.
        following = scales, offsets
        if fmt.group_size is not None:
            following = scales_of(lax.min(stage + 1, end - 1))
        for j in range(config.slices):
            right = plgpu.load(
                x_s.at[slot, :, pl.ds(64 * j, 64)].T, layout=plgpu.Layout.MMA_RHS(dtype)
            )
            groups = [dequant.row_of(fmt, 64 * j + 64 * i // fmt.groups) for i in range(fmt.groups)]
            for t in range(config.tiles):
                words = plgpu.load(w_s.at[slot, t, j], layout=WORDS)
                left: Any = dequant.operand(
                    fmt,
                    words,
                    [scales[t][g] for g in groups],
                    [offsets[t][g] for g in groups] if offset is not None else [],
                    mma=True,
                )
                sums[t] = plgpu.mma(sums[t], left, right)
        return tuple(sums), following

    zeros = jnp.zeros((64, config.block_m), jnp.float32)
    sums = tuple(plgpu.layout_cast(zeros, plgpu.Layout.MMA_ACC(dtype)) for _ in range(config.tiles))
    sums, _ = pipeline.run(plan.sizes, first, end, issue, step, (sums, scales_of(first)))
    for t in range(config.tiles):
        columns = pl.ds(64 * t, 64)
        if config.split > 1:
            out_s.at[columns, :][...] = sums[t]
            continue
        factor = normaliser.at[pl.ds(first_n + 64 * t, 64)]
        factor = plgpu.load(factor, layout=ROWS, optimized=False)
        y = (sums[t] * lax.broadcast_in_dim(factor, sums[t].shape, [0])).astype(dtype)
        # x was the transposed operand, so y^T is what the registers hold.
        out_s.at[:, columns].T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
    rows, columns = pl.ds(first_m, config.block_m), pl.ds(first_n, config.block_n)
    target = out.at[part, columns, rows] if config.split > 1 else out.at[rows, columns]
    pipeline.store(out_s, target, plan.out_swizzle)
