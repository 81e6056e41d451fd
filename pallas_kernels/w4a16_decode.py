"""The decode kernel: few rows, so that the time is that of reading the weight.

A block computes 64 * tiles * warpgroups columns as y^T = w^T x^T: the weight is wgmma's A operand,
dequantized in registers, and the rows of x are its n.  One warpgroup copies (TMA), the others
multiply; the next slice is dequantized while the tensor cores work on the last.  `split` blocks of
a cluster share the inputs and add their sums in the first one's shared memory, in a fixed order.

Rows, columns and inputs beyond the arrays read as zeros and are not written.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jq.pallas_kernels import dequant
from jq.pallas_kernels.compat import ROWS, WORDS, pl, plgpu, swizzled
from jq.pallas_kernels.config import DecodeConfig
from jq.pallas_kernels.schedule import (
    cluster_memory,
    launch,
    next_slot,
    previous_slot,
    receive,
    send,
)
from jq.pallas_kernels.weight import W4Weight


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one call."""

    config: DecodeConfig
    fmt: dequant.Format
    m: int
    n: int
    k: int
    interpret: bool

    @property
    def columns(self) -> int:
        """Of a warpgroup."""
        return 64 * self.config.tiles

    @property
    def block_n(self) -> int:
        return self.columns * self.config.warpgroups

    @property
    def inputs(self) -> int:
        """Of a stage."""
        return 64 * self.config.slices

    @property
    def steps(self) -> int:
        """Stages that each block of a cluster goes through."""
        return math.ceil(self.k / (self.inputs * self.config.split))

    @property
    def partials(self) -> tuple[int, ...]:
        """Shape of what a cluster's other blocks send to its first."""
        config = self.config
        return (config.split - 1, config.warpgroups, self.columns, config.block_m)

    @property
    def rows(self) -> int:
        """Of scales in a stage."""
        return dequant.rows_per_stage(self.fmt, self.inputs)


def decode(x: jax.Array, w: W4Weight, config: DecodeConfig, interpret: bool = False) -> jax.Array:
    """x [M, K] @ w [K, N] -> [M, N] in x's dtype.  With `interpret` on a CPU, detecting races."""
    fmt = dequant.Format(w.dtype, w.group_size, w.symmetric)
    plan = _Plan(config, fmt, x.shape[0], w.n, w.k, interpret)
    inputs = [x, w.fragments, w.normaliser, w.scale]
    if w.offset is not None:
        inputs.append(w.offset)
    name = f"w4a16_{config.name}_{fmt.name}"
    return launch(_kernel, plan, inputs, _shared_memory(plan), (x.dtype, jnp.float32), name)


def _shared_memory(plan: _Plan) -> dict:
    config, dtype = plan.config, jnp.dtype(plan.fmt.dtype)
    stages, warpgroups = config.stages, config.warpgroups
    tiles = warpgroups * config.tiles
    copies = 3 if plan.fmt.symmetric else 4
    shared = {
        "x_s": swizzled((stages, config.block_m, plan.inputs), dtype),
        "w_s": plgpu.SMEM((stages, tiles, config.slices, 4, 128), jnp.int32),
        "scale_s": plgpu.SMEM((stages, plan.rows, plan.block_n), dtype),
        "normaliser_s": plgpu.SMEM((plan.block_n,), jnp.float32),
        "out_s": swizzled((warpgroups, config.block_m, plan.columns), dtype),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "ready": plgpu.Barrier(num_arrivals=1),
    }
    if not plan.fmt.symmetric:
        shared["offset_s"] = plgpu.SMEM((stages, plan.rows, plan.block_n), dtype)
    if plan.interpret:
        shared["staging"] = swizzled((warpgroups, 2, 64, 64), dtype)
    return shared | cluster_memory(plan.partials, jnp.float32, plan.interpret)


def _kernel(plan: _Plan, x, w, normaliser, scale, *rest, **shared) -> None:
    offset, rest = (None, rest) if plan.fmt.symmetric else (rest[0], rest[1:])
    out, *mailbox = rest
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.config.warpgroups)
    def _():
        _compute(plan, warpgroup, out, mailbox[0] if mailbox else None, **shared)

    @pl.when(warpgroup == plan.config.warpgroups)
    def _():
        _copy(plan, x, w, normaliser, scale, offset, **shared)


def _copy(plan: _Plan, x, w, normaliser, scale, offset, *, full, empty, **shared) -> None:
    """Fill the stages, in order, as they become empty."""
    config = plan.config
    n, m, part = (lax.axis_index(name) for name in ("n", "m", "part"))
    tiles = config.warpgroups * config.tiles
    columns = pl.ds(n * plan.block_n, plan.block_n)
    plgpu.copy_gmem_to_smem(normaliser.at[columns], shared["normaliser_s"], shared["ready"])

    def step(i, slot):
        @pl.when(i >= config.stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])
            plgpu.commit_smem()

        stage = part * plan.steps + i
        barrier = full.at[slot]
        fragments = w.at[pl.ds(n * tiles, tiles), pl.ds(stage * config.slices, config.slices)]
        plgpu.copy_gmem_to_smem(fragments, shared["w_s"].at[slot], barrier)
        rows = pl.ds(dequant.first_row(plan.fmt, stage * plan.inputs), plan.rows)
        plgpu.copy_gmem_to_smem(scale.at[rows, columns], shared["scale_s"].at[slot], barrier)
        if offset is not None:
            plgpu.copy_gmem_to_smem(offset.at[rows, columns], shared["offset_s"].at[slot], barrier)
        if config.pdl and not plan.interpret:
            # Everything before reads weights only; x is the last kernel's to write.
            pl.when(i == 0)(plgpu.griddepcontrol_wait)
        block = x.at[
            pl.ds(m * config.block_m, config.block_m), pl.ds(stage * plan.inputs, plan.inputs)
        ]
        plgpu.copy_gmem_to_smem(block, shared["x_s"].at[slot], barrier)
        return next_slot(slot, config.stages)

    lax.fori_loop(0, plan.steps, step, jnp.int32(0))
    if config.pdl and not plan.interpret:
        plgpu.griddepcontrol_launch_dependents()
    # The last stage is not handed back; the others are waited for before the block may end.
    for i in range(max(0, plan.steps - config.stages), plan.steps - 1):
        plgpu.barrier_wait(empty.at[i % config.stages])


def _compute(plan: _Plan, warpgroup, out, mailbox, *, full, empty, **shared) -> None:
    """Multiply stage after stage, then reduce, scale and store."""
    config, fmt = plan.config, plan.fmt

    def rows(name, slot, tile):
        """Slice -> scales or offsets of its groups, for 64 columns; each row is loaded once."""
        columns = pl.ds(warpgroup * plan.columns + 64 * tile, 64)

        @functools.cache
        def load(row):
            return plgpu.load(shared[name].at[slot, row, columns], layout=ROWS)

        def of_slice(j):
            first = [64 * j + 64 * i // fmt.groups for i in range(fmt.groups)]
            return [load(dequant.row_of(fmt, f)) for f in first] if name in shared else []

        return of_slice

    def multiply(accumulator):
        def step(i, slot):
            plgpu.barrier_wait(full.at[slot])
            scales = [rows("scale_s", slot, t) for t in range(config.tiles)]
            offsets = [rows("offset_s", slot, t) for t in range(config.tiles)]
            for j in range(config.slices):
                x = shared["x_s"].at[slot, :, pl.ds(64 * j, 64)].T
                for t in range(config.tiles):
                    tile = shared["w_s"].at[slot, warpgroup * config.tiles + t, j]
                    dequant.multiply(
                        fmt,
                        accumulator if config.tiles == 1 else accumulator.at[pl.ds(64 * t, 64)],
                        plgpu.load(tile, layout=WORDS),
                        scales[t](j),
                        offsets[t](j),
                        x,
                        shared["staging"].at[warpgroup, j % 2] if plan.interpret else None,
                    )
                plgpu.wgmma_wait(config.tiles)
                if j == 0:
                    # All that read the stage before is done by now.
                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[previous_slot(slot, config.stages)])

            return next_slot(slot, config.stages)

        lax.fori_loop(0, plan.steps, step, jnp.int32(0))
        return accumulator[...]

    sums = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((plan.columns, config.block_m)))
    part = lax.axis_index("part")
    # Every block waits, or one could end while its copy is under way.
    plgpu.barrier_wait(shared["ready"])
    if config.split > 1:
        send(sums, part, warpgroup, mailbox, shared)

    @pl.when(part == 0)
    def _():
        total = sums
        if config.split > 1:
            total = receive(sums, config.split, warpgroup, mailbox, shared)
        own = pl.ds(warpgroup * plan.columns, plan.columns)
        factor = plgpu.load(shared["normaliser_s"].at[own], layout=ROWS)
        y = (total * lax.broadcast_in_dim(factor, total.shape, [0])).astype(out.dtype)
        # x was the transposed operand, so y^T is what the registers hold.
        staged = shared["out_s"].at[warpgroup]
        staged.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        first = lax.axis_index("n") * plan.block_n + warpgroup * plan.columns
        rows_out = pl.ds(lax.axis_index("m") * config.block_m, config.block_m)
        plgpu.copy_smem_to_gmem(staged, out.at[rows_out, pl.ds(first, plan.columns)])
        plgpu.wait_smem_to_gmem(0)
