"""The W8A8 prefill kernel: many rows, so that the time is that of the tensor cores.

One block per multiprocessor walks over tiles of 64 * warpgroups rows x `block_n` columns.  Each
warpgroup multiplies 64 rows; one more copies ahead across tile boundaries, so that the next tile's
inputs arrive while this one's sums are scaled and written.  With `multicast` two blocks of a
cluster share the rows, or the columns, and each copy of those reaches both.

int8 products are summed in int32 throughout.  The tensor cores keep few bits of a float8 sum: every
128 inputs it is added to one in float32, with the scales of its block if there are any, while the
tensor cores work for another warpgroup.

Rows, columns and inputs beyond the arrays read as zeros and are not written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq.pallas_kernels.compat import (
    COLUMNS,
    FRAGMENT,
    ROWS,
    core_count,
    interpreter,
    pl,
    plgpu,
    swizzled,
)
from jq.pallas_kernels.config8 import SLICE, Prefill8Config
from jq.pallas_kernels.schedule import next_slot, previous_slot
from jq.pallas_kernels.weight8 import W8Weight

# Registers per thread of the warpgroups that multiply, and of the one that copies; a single one
# gets enough as it is.
_REGISTERS = {2: (232, 40), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one call."""

    config: Prefill8Config
    m: int
    n: int
    k: int
    dtype: jnp.dtype
    block: bool
    scales: int  # rows that have one
    out_dtype: jnp.dtype

    @property
    def cluster(self) -> tuple[int, int]:
        """Blocks of a cluster along the rows, and along the columns."""
        return {None: (1, 1), "w": (2, 1), "x": (1, 2)}[self.config.multicast]

    @property
    def grid(self) -> tuple[int, int]:
        """Clusters along the rows, and along the columns."""
        rows, columns = self.cluster
        return (
            math.ceil(self.m / (self.config.block_m * rows)),
            math.ceil(self.n / (self.config.block_n * columns)),
        )

    @property
    def tiles(self) -> int:
        return math.prod(self.grid)

    @property
    def swizzle(self) -> int:
        """Bytes of a row of codes that lie together: Mosaic lowers no copy from an array of more
        inputs that does not divide into them."""
        return SLICE if self.k % SLICE == 0 else SLICE // 2

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return math.ceil(self.k / SLICE)

    @property
    def pieces(self) -> int:
        """Of a warpgroup's result, 64 columns each."""
        return self.config.block_n // 64


def prefill8(
    x: jax.Array,
    x_scale: jax.Array,
    w: W8Weight,
    bias: jax.Array | None,
    out_dtype,
    config: Prefill8Config,
    interpret: bool = False,
    clusters: int | None = None,
) -> jax.Array:
    """x [M, K] @ w [K, N] -> [M, N].  With `interpret` on a CPU, detecting races.

    x_scale: float32 [R], R <= M, or [K/128 * R] with the R scales of a block beside each other;
    rows of x without a scale give anything.  `clusters` blocks (or pairs of blocks) walk over the
    tiles; None: as many as fit the device.
    Raises: ValueError when the config is not for the weight's dtype.
    """
    if reason := config.unsupported(w.dtype.name):
        raise ValueError(reason)
    (m, k), block = x.shape, w.block is not None
    rows = x_scale.size * SLICE // k if block else x_scale.size
    plan = _Plan(config, m, w.n, k, w.dtype, block, rows, jnp.dtype(out_dtype))
    inputs = [x, x_scale, w.codes, w.scale] + ([] if bias is None else [bias])
    pair = math.prod(plan.cluster)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct((m, plan.n), plan.out_dtype),
        scratch_types=_shared_memory(plan),
        grid=(min(clusters or core_count() // pair, plan.tiles),),
        grid_names=("cluster",),
        cluster=(pair,),
        cluster_names=("pair",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter(interpret),
        kernel_name=f"w8a8_{config.name}_{plan.dtype.name}" + "_blocks" * block,
    )
    return kernel(*inputs)


def _shared_memory(plan: _Plan) -> dict:
    config = plan.config
    stages, warpgroups = config.stages, config.warpgroups
    # Swizzled memory comes first: it starts at whole kilobytes.
    shared: dict[str, Any] = {
        "x_s": swizzled((stages, config.block_m, SLICE), plan.dtype, plan.swizzle),
        "w_s": swizzled((stages, config.block_n, SLICE), plan.dtype, plan.swizzle),
        "out_s": swizzled((warpgroups, 2, 64, 64), plan.out_dtype),
    }
    if plan.block:
        shared["scale_s"] = plgpu.SMEM((stages, config.block_m), jnp.float32)
    else:
        shared["scale_s"] = plgpu.SMEM((config.block_m + config.block_n,), jnp.float32)
    shared["full"] = plgpu.Barrier(num_arrivals=2 + plan.block, num_barriers=stages)
    if config.multicast:
        shared["empty"] = plgpu.ClusterBarrier(
            collective_axes=("pair",), num_arrivals=warpgroups, num_barriers=stages
        )
    else:
        shared["empty"] = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    if not plan.block:
        shared["ends_full"] = plgpu.Barrier(num_arrivals=2)
        shared["ends_empty"] = plgpu.Barrier(num_arrivals=warpgroups)
    return shared


def _kernel(plan: _Plan, x, x_scale, w, w_scale, *rest, **shared) -> None:
    *bias, out = rest
    warpgroup = lax.axis_index("warpgroup")
    warpgroups = plan.config.warpgroups
    multiplying, copying = _REGISTERS.get(warpgroups, (None, None))

    @pl.when(warpgroup < warpgroups)
    def _():
        if multiplying is not None:
            plgpu.set_max_registers(multiplying, action="increase")
        _compute(plan, warpgroup, w_scale, bias[0] if bias else None, out, **shared)

    @pl.when(warpgroup == warpgroups)
    def _():
        if copying is not None:
            plgpu.set_max_registers(copying, action="decrease")
        _copy(plan, x, x_scale, w, w_scale, **shared)


def _tile(plan: _Plan, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first row, first column) of a tile; neighbours share rows of x in the L2 cache."""
    m, n = plgpu.planar_snake(index, plan.grid, 0, plan.config.snake)
    pair = lax.axis_index("pair")
    rows, columns = plan.cluster
    m = m * rows + (pair if rows > 1 else 0)
    n = n * columns + (pair if columns > 1 else 0)
    return m * plan.config.block_m, n * plan.config.block_n


def _copy(plan: _Plan, x, x_scale, w, w_scale, *, full, empty, **shared) -> None:
    """Fill the stages, in order, as they become empty, for one tile after the other."""
    config = plan.config
    share_x = "pair" if config.multicast == "x" else None
    share_w = "pair" if config.multicast == "w" else None

    @plgpu.nd_loop((plan.tiles,), collective_axes="cluster", init_carry=jnp.int32(0))
    def last(info, carry):
        row, column = _tile(plan, info.index[0])
        rows, columns = pl.ds(row, config.block_m), pl.ds(column, config.block_n)
        filled = info.local_index * plan.steps

        def step(i, slot):
            @pl.when(filled + i >= config.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])
                plgpu.commit_smem()

            barrier, inputs = full.at[slot], pl.ds(i * SLICE, SLICE)
            x_s, w_s = shared["x_s"].at[slot], shared["w_s"].at[slot]
            plgpu.copy_gmem_to_smem(x.at[rows, inputs], x_s, barrier, collective_axes=share_x)
            plgpu.copy_gmem_to_smem(w.at[columns, inputs], w_s, barrier, collective_axes=share_w)
            if plan.block:
                scales = x_scale.at[pl.ds(i * plan.scales + row, config.block_m)]
                plgpu.copy_gmem_to_smem(scales, shared["scale_s"].at[slot], barrier)
            return next_slot(slot, config.stages)

        end = lax.fori_loop(0, plan.steps, step, carry)
        if not plan.block:
            # Not before the stages: those of the last tile's end would wait for its sums.
            @pl.when(info.local_index > 0)
            def _():
                plgpu.barrier_wait(shared["ends_empty"])
                plgpu.commit_smem()

            ready = shared["ends_full"]
            of_rows = shared["scale_s"].at[pl.ds(0, config.block_m)]
            plgpu.copy_gmem_to_smem(x_scale.at[rows], of_rows, ready)
            of_columns = shared["scale_s"].at[pl.ds(config.block_m, config.block_n)]
            plgpu.copy_gmem_to_smem(w_scale.at[columns], of_columns, ready)
        return end

    del last
    # Everything is handed back: wait for all that was filled before the block may end.
    clusters = lax.axis_size("cluster")
    own = (plan.tiles - 1 - lax.axis_index("cluster")) // clusters + 1
    for i in range(config.stages):
        pl.when(i < own * plan.steps)(functools.partial(plgpu.barrier_wait, empty.at[i]))
    if not plan.block:
        plgpu.barrier_wait(shared["ends_empty"])


def _compute(plan: _Plan, warpgroup, w_scale, bias, out, **shared) -> None:
    """Multiply stage after stage, then scale and store, for one tile after the other."""
    multiply = _exactly if plan.dtype == jnp.int8 else _promoting

    @plgpu.nd_loop((plan.tiles,), collective_axes="cluster", init_carry=jnp.int32(0))
    def last(info, carry):
        row, column = _tile(plan, info.index[0])
        sums, end = multiply(plan, warpgroup, w_scale, column, carry, **shared)
        if not plan.block:
            plgpu.barrier_wait(shared["ends_full"])
        for piece in range(plan.pieces):
            y = _scaled(plan, sums, warpgroup, piece, **shared)
            if bias is not None:
                # Columns beyond the weight are thrown away: any bias does.
                first = lax.min(column + piece * 64, jnp.int32(plan.n - 64))
                own = plgpu.load(bias.at[pl.ds(first, 64)], layout=COLUMNS, optimized=False)
                y = y + lax.broadcast_in_dim(own.astype(jnp.float32), y.shape, [1])
            if not plan.block and piece == plan.pieces - 1:
                plgpu.barrier_arrive(shared["ends_empty"])
            # The store before the last one has read its half of the staging memory by now.
            plgpu.wait_smem_to_gmem(min(piece, 1), wait_read_only=True)
            staged = shared["out_s"].at[warpgroup, piece % 2]
            staged[...] = y.astype(plan.out_dtype)
            plgpu.commit_smem()
            rows = pl.ds(row + warpgroup * 64, 64)
            plgpu.copy_smem_to_gmem(staged, out.at[rows, pl.ds(column + piece * 64, 64)])
        return end

    del last
    plgpu.wait_smem_to_gmem(0)


def _scaled(plan: _Plan, sums, warpgroup, piece, **shared):
    """64 columns of the sums with their scales, float32."""
    y = sums[:, piece * 64 : (piece + 1) * 64].astype(jnp.float32)
    if not plan.block:
        x_scale = plgpu.load(shared["scale_s"].at[pl.ds(warpgroup * 64, 64)], layout=ROWS)
        y = y * lax.broadcast_in_dim(x_scale, y.shape, [0])
        first = plan.config.block_m + piece * 64
        w_scale = plgpu.load(shared["scale_s"].at[pl.ds(first, 64)], layout=COLUMNS)
        y = y * lax.broadcast_in_dim(w_scale, y.shape, [1])
    return y


def _exactly(plan: _Plan, warpgroup, w_scale, column, first_slot, *, full, empty, x_s, w_s, **_):
    """int32 sums, and the next stage: each is handed back once the next one is under way."""
    del w_scale, column
    config = plan.config
    own = pl.ds(warpgroup * 64, 64)

    def release(slot):
        plgpu.barrier_arrive(empty.at[previous_slot(slot, config.stages)])

    def multiply(accumulator):
        def step(i, slot):
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(accumulator, x_s.at[slot, own], w_s.at[slot].T)
            plgpu.wgmma_wait(1)
            # All that read the stage before is done by now.
            pl.when(i > 0)(functools.partial(release, slot))
            return next_slot(slot, config.stages)

        end = lax.fori_loop(0, plan.steps, step, first_slot)
        plgpu.wgmma_wait(0)
        release(end)
        return accumulator[...], end

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, config.block_n), jnp.int32))


def _promoting(
    plan: _Plan, warpgroup, w_scale, column, first_slot, *, full, empty, x_s, w_s, scale_s, **_
):
    """float32 sums of the tensor cores' sums over 128 inputs each, and the next stage."""
    config = plan.config
    shape = (64, config.block_n)
    own = pl.ds(warpgroup * 64, 64)
    # The weight's block; columns beyond the last one are thrown away, whatever their scale.
    block = lax.min(lax.div(column, SLICE), jnp.int32(plan.n // SLICE - 1))

    def step(i, carry):
        slot, total = carry
        # Read before the wait, which hides it.
        factor = w_scale[block, i] if plan.block else jnp.float32(1)
        plgpu.barrier_wait(full.at[slot])

        def multiply(accumulator):
            plgpu.wgmma(accumulator, x_s.at[slot, own], w_s.at[slot].T)
            return accumulator[...]

        sums = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape))
        scale = plgpu.load(scale_s.at[slot, own], layout=ROWS) * factor if plan.block else None
        # The stage is handed back before the sums are added, which takes as long as a copy's start.
        plgpu.barrier_arrive(empty.at[slot])
        if scale is not None:
            sums = sums * lax.broadcast_in_dim(scale, shape, [0])
        return next_slot(slot, config.stages), total + sums

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), FRAGMENT)
    end, total = lax.fori_loop(0, plan.steps, step, (first_slot, zeros))
    return total, end
