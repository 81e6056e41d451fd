"""The prefill kernel: many rows, so that the time is that of the tensor cores.

One block per multiprocessor walks over tiles of `block_m` rows x 128 columns, two warpgroups
multiplying 64 columns each as y^T = w^T x^T, a third one copying ahead across tile boundaries, so
that the next tile's inputs arrive while this one's sums are written.  With `multicast` two blocks
of a cluster take neighbouring columns of the same rows, and each copy of x reaches both.

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
from jq.pallas_kernels.compat import ROWS, WORDS, core_count, interpreter, pl, plgpu, swizzled
from jq.pallas_kernels.config import PrefillConfig
from jq.pallas_kernels.schedule import next_slot, previous_slot
from jq.pallas_kernels.weight import W4Weight

# A compute warpgroup holds 128 registers of sums and 32 of operands; the copying one needs few.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 232, 40
# Two slices are unrolled: the operands of one are written while the other's are read.
_UNROLL = 2


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one call."""

    config: PrefillConfig
    fmt: dequant.Format
    m: int
    n: int
    k: int
    interpret: bool

    @property
    def cluster(self) -> int:
        return 2 if self.config.multicast else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles: blocks of rows, and clusters of blocks of columns."""
        columns = self.config.block_n * self.cluster
        return math.ceil(self.m / self.config.block_m), math.ceil(self.n / columns)

    @property
    def tiles(self) -> int:
        return math.prod(self.grid)

    @property
    def steps(self) -> int:
        """Slices of a tile; an odd last one is followed by one of zeros."""
        return _UNROLL * math.ceil(self.k / (64 * _UNROLL))

    @property
    def rows(self) -> int:
        """Of scales in a stage."""
        return dequant.rows_per_stage(self.fmt, 64)


def prefill(
    x: jax.Array,
    w: W4Weight,
    config: PrefillConfig,
    interpret: bool = False,
    clusters: int | None = None,
) -> jax.Array:
    """x [M, K] @ w [K, N] -> [M, N] in x's dtype.  With `interpret` on a CPU, detecting races.

    `clusters` blocks (or pairs of blocks) walk over the tiles; None: as many as fit the device.
    """
    fmt = dequant.Format(w.dtype, w.group_size, w.symmetric)
    plan = _Plan(config, fmt, x.shape[0], w.n, w.k, interpret)
    inputs = [x, w.fragments, w.normaliser, w.scale]
    if w.offset is not None:
        inputs.append(w.offset)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), x.dtype),
        scratch_types=_shared_memory(plan),
        grid=(min(clusters or core_count() // plan.cluster, plan.tiles),),
        grid_names=("cluster",),
        cluster=(plan.cluster,),
        cluster_names=("pair",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter(interpret),
        kernel_name=f"w4a16_{config.name}_{fmt.name}",
    )
    return kernel(*inputs)


def _shared_memory(plan: _Plan) -> dict:
    config, dtype = plan.config, jnp.dtype(plan.fmt.dtype)
    stages, warpgroups = config.stages, config.warpgroups
    copies = 3 if plan.fmt.symmetric else 4
    if config.multicast:
        empty = plgpu.ClusterBarrier(
            collective_axes=("pair",), num_arrivals=warpgroups, num_barriers=stages
        )
    else:
        empty = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    shared = {
        "x_s": swizzled((stages, config.block_m, 64), dtype),
        "w_s": plgpu.SMEM((stages, warpgroups, 4, 128), jnp.int32),
        "scale_s": plgpu.SMEM((stages, plan.rows, config.block_n), dtype),
        "out_s": swizzled((warpgroups, config.block_m, 64), dtype),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "empty": empty,
    }
    if not plan.fmt.symmetric:
        shared["offset_s"] = plgpu.SMEM((stages, plan.rows, config.block_n), dtype)
    if plan.interpret:
        shared["staging"] = swizzled((warpgroups, _UNROLL, 64, 64), dtype)
    return shared


def _kernel(plan: _Plan, x, w, normaliser, scale, *rest, **shared) -> None:
    offset, out = (None, rest[0]) if plan.fmt.symmetric else rest
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.config.warpgroups)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _compute(plan, warpgroup, normaliser, out, **shared)

    @pl.when(warpgroup == plan.config.warpgroups)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        _copy(plan, x, w, scale, offset, **shared)


def _tile(plan: _Plan, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(block of rows, block of columns) of a tile; neighbours share rows of x in the L2 cache."""
    m, n = plgpu.planar_snake(index, plan.grid, 0, plan.config.snake)
    return m, n * plan.cluster + lax.axis_index("pair")


def _copy(plan: _Plan, x, w, scale, offset, *, full, empty, **shared) -> None:
    """Fill the stages, in order, as they become empty, for one tile after the other."""
    config = plan.config
    pair = "pair" if config.multicast else None

    @plgpu.nd_loop((plan.tiles,), collective_axes="cluster", init_carry=jnp.int32(0))
    def last(info, carry):
        m, n = _tile(plan, info.index[0])
        columns = pl.ds(n * config.block_n, config.block_n)
        filled = info.local_index * plan.steps

        def step(i, slot):
            @pl.when(filled + i >= config.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])
                plgpu.commit_smem()

            barrier = full.at[slot]
            fragments = w.at[pl.ds(n * config.warpgroups, config.warpgroups), i]
            plgpu.copy_gmem_to_smem(fragments, shared["w_s"].at[slot], barrier)
            block = x.at[pl.ds(m * config.block_m, config.block_m), pl.ds(i * 64, 64)]
            plgpu.copy_gmem_to_smem(block, shared["x_s"].at[slot], barrier, collective_axes=pair)
            rows = pl.ds(dequant.first_row(plan.fmt, i * 64), plan.rows)
            plgpu.copy_gmem_to_smem(scale.at[rows, columns], shared["scale_s"].at[slot], barrier)
            if offset is not None:
                offsets = offset.at[rows, columns]
                plgpu.copy_gmem_to_smem(offsets, shared["offset_s"].at[slot], barrier)
            return next_slot(slot, config.stages)

        return lax.fori_loop(0, plan.steps, step, carry)

    # Every stage is handed back: wait for all that were filled before the block may end.
    clusters = lax.axis_size("cluster")
    own = (plan.tiles - 1 - lax.axis_index("cluster")) // clusters + 1
    for i in range(config.stages):
        pl.when(i < own * plan.steps)(functools.partial(plgpu.barrier_wait, empty.at[i]))


def _compute(plan: _Plan, warpgroup, normaliser, out, *, full, empty, **shared) -> None:
    """Multiply slice after slice, then scale and store, for one tile after the other."""
    config, fmt = plan.config, plan.fmt

    def rows(name, slot):
        """Scales or offsets of a slice's groups."""
        if name not in shared:
            return []
        refs = [shared[name].at[slot, i, pl.ds(warpgroup * 64, 64)] for i in range(fmt.groups)]
        return [plgpu.load(ref, layout=ROWS) for ref in refs]

    def release(slot):
        plgpu.barrier_arrive(empty.at[previous_slot(slot, config.stages)])

    @plgpu.nd_loop((plan.tiles,), collective_axes="cluster", init_carry=jnp.int32(0))
    def last(info, carry):
        m, n = _tile(plan, info.index[0])
        first = n * config.block_n + warpgroup * 64
        # Columns beyond the weight are computed and thrown away: any factor does.
        factor = normaliser.at[pl.ds(lax.min(first, jnp.int32(plan.n - 64)), 64)]
        factor = plgpu.load(factor, layout=ROWS, optimized=False)

        def multiply(accumulator):
            def step(i, first_slot):
                for j in range(_UNROLL):
                    slot = first_slot + j
                    plgpu.barrier_wait(full.at[slot])
                    dequant.multiply(
                        fmt,
                        accumulator,
                        plgpu.load(shared["w_s"].at[slot, warpgroup], layout=WORDS),
                        rows("scale_s", slot),
                        rows("offset_s", slot),
                        shared["x_s"].at[slot].T,
                        shared["staging"].at[warpgroup, j] if plan.interpret else None,
                    )
                    plgpu.wgmma_wait(1)
                    # All that read the stage before is done by now.
                    if j > 0:
                        plgpu.barrier_arrive(empty.at[slot - 1])
                    else:
                        pl.when(i > 0)(functools.partial(release, slot))
                end = config.stages - _UNROLL
                return lax.select(first_slot == end, jnp.int32(0), first_slot + _UNROLL)

            end = lax.fori_loop(0, plan.steps // _UNROLL, step, carry)
            plgpu.wgmma_wait(0)
            release(end)
            return accumulator[...], end

        sums, end = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, config.block_m)))
        y = (sums * lax.broadcast_in_dim(factor, sums.shape, [0])).astype(out.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged = shared["out_s"].at[warpgroup]
        # x was the transposed operand, so y^T is what the registers hold.
        staged.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        rows_out = pl.ds(m * config.block_m, config.block_m)
        plgpu.copy_smem_to_gmem(staged, out.at[rows_out, pl.ds(first, 64)])
        return end

    del last
    plgpu.wait_smem_to_gmem(0)
