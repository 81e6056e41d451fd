"""The W8A8 decode kernel: few rows, so that the time is that of reading the weight.

A block computes 64 * warpgroups columns as y^T = w^T x^T: the weight's codes are wgmma's A operand,
straight from shared memory, and the rows of x are its n.  One warpgroup copies (TMA), the others
multiply.  int8 products are summed in int32 throughout.  The tensor cores keep few bits of a float8
sum: every 128 inputs it is added to one in float32, with the scales of its block if there are any.
`split` blocks of a cluster share the inputs and add their sums in the first one's shared memory, in
a fixed order.

Rows, columns and inputs beyond the arrays read as zeros and are not written.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq.pallas_kernels.compat import COLUMNS, FRAGMENT, ROWS, pl, plgpu, swizzled
from jq.pallas_kernels.config8 import SLICE, Decode8Config, scale_rows
from jq.pallas_kernels.schedule import (
    cluster_memory,
    launch,
    next_slot,
    previous_slot,
    receive,
    send,
)
from jq.pallas_kernels.weight8 import W8Weight


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one call."""

    config: Decode8Config
    m: int
    n: int
    k: int
    dtype: jnp.dtype
    block: bool
    bias: jnp.dtype | None
    scales: int  # rows that have one
    out_dtype: jnp.dtype
    interpret: bool

    @property
    def sum_dtype(self):
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32

    @property
    def inputs(self) -> int:
        """Of a stage."""
        return SLICE * self.config.slices

    @property
    def swizzle(self) -> int:
        """Bytes of a row of codes that lie together: Mosaic lowers no copy from an array of more
        inputs that does not divide into them."""
        return SLICE if self.k % SLICE == 0 else SLICE // 2

    @property
    def steps(self) -> int:
        """Stages that each block of a cluster goes through."""
        return math.ceil(self.k / (self.inputs * self.config.split))

    @property
    def partials(self) -> tuple[int, ...]:
        """Shape of what a cluster's other blocks send to its first."""
        config = self.config
        return (config.split - 1, config.warpgroups, 64, config.block_m)

    @property
    def ends(self) -> int:
        """Copies that only the end of the kernel needs: scales of columns and of rows, the bias."""
        return 2 * (not self.block) + (self.bias is not None)


def decode8(
    x: jax.Array,
    x_scale: jax.Array,
    w: W8Weight,
    bias: jax.Array | None,
    out_dtype,
    config: Decode8Config,
    interpret: bool = False,
) -> jax.Array:
    """x [M, K] @ w [K, N] -> [M, N].  With `interpret` on a CPU, detecting races.

    x_scale: float32 [R], R <= M, or [K/128 * R] with the R scales of a block beside each other;
    rows of x without a scale give anything.
    """
    (m, k), block = x.shape, w.block is not None
    rows = x_scale.size * SLICE // k if block else x_scale.size
    bias_dtype = None if bias is None else jnp.dtype(bias.dtype)
    plan = _Plan(
        config, m, w.n, k, w.dtype, block, bias_dtype, rows, jnp.dtype(out_dtype), interpret
    )
    inputs = [x, x_scale, w.codes, w.scale]
    if bias is not None:
        inputs.append(bias)
    name = f"w8a8_{config.name}_{plan.dtype.name}" + "_blocks" * block
    return launch(
        _kernel, plan, inputs, _shared_memory(plan), (plan.out_dtype, plan.sum_dtype), name
    )


def _shared_memory(plan: _Plan) -> dict:
    config = plan.config
    stages, warpgroups = config.stages, config.warpgroups
    rows = scale_rows(config.block_m)
    # Swizzled memory comes first: it starts at whole kilobytes.
    shared: dict[str, Any] = {
        "x_s": swizzled((stages, config.block_m, plan.inputs), plan.dtype, plan.swizzle),
        "w_s": swizzled((stages, config.block_n, plan.inputs), plan.dtype, plan.swizzle),
        "out_s": swizzled((warpgroups, config.block_m, 64), plan.out_dtype),
    }
    shared |= cluster_memory(plan.partials, plan.sum_dtype, plan.interpret)
    if plan.bias is not None:
        shared["bias_s"] = plgpu.SMEM((config.block_n,), plan.bias)
    if plan.block:
        shared["scale_s"] = plgpu.SMEM((stages, config.slices, rows), jnp.float32)
    else:
        shared["scale_s"] = plgpu.SMEM((rows + config.block_n,), jnp.float32)
    copies = 2 + config.slices * plan.block
    shared["full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    shared["empty"] = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    if plan.ends:
        shared["ready"] = plgpu.Barrier(num_arrivals=plan.ends)
    return shared


def _kernel(plan: _Plan, x, x_scale, w, w_scale, *rest, **shared) -> None:
    bias, rest = (None, rest) if plan.bias is None else (rest[0], rest[1:])
    out, *mailbox = rest
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.config.warpgroups)
    def _():
        _compute(plan, warpgroup, w_scale, out, mailbox[0] if mailbox else None, **shared)

    @pl.when(warpgroup == plan.config.warpgroups)
    def _():
        _copy(plan, x, x_scale, w, w_scale, bias, **shared)


def _copy(plan: _Plan, x, x_scale, w, w_scale, bias, *, full, empty, **shared) -> None:
    """Fill the stages, in order, as they become empty."""
    config = plan.config
    n, m, part = (lax.axis_index(name) for name in ("n", "m", "part"))
    columns = pl.ds(n * config.block_n, config.block_n)
    first_row = m * config.block_m
    rows = scale_rows(config.block_m)
    if not plan.block:
        of_columns = shared["scale_s"].at[pl.ds(rows, config.block_n)]
        plgpu.copy_gmem_to_smem(w_scale.at[columns], of_columns, shared["ready"])
    if bias is not None:
        plgpu.copy_gmem_to_smem(bias.at[columns], shared["bias_s"], shared["ready"])

    def step(i, slot):
        @pl.when(i >= config.stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])
            plgpu.commit_smem()

        stage = part * plan.steps + i
        barrier = full.at[slot]
        inputs = pl.ds(stage * plan.inputs, plan.inputs)
        plgpu.copy_gmem_to_smem(w.at[columns, inputs], shared["w_s"].at[slot], barrier)
        if config.pdl and not plan.interpret:
            # Everything before reads weights only; x is the last kernel's to write.
            pl.when(i == 0)(plgpu.griddepcontrol_wait)
        block = x.at[pl.ds(first_row, config.block_m), inputs]
        plgpu.copy_gmem_to_smem(block, shared["x_s"].at[slot], barrier)
        if plan.block:
            for j in range(config.slices):
                first = (stage * config.slices + j) * plan.scales + first_row
                scales = x_scale.at[pl.ds(first, rows)]
                plgpu.copy_gmem_to_smem(scales, shared["scale_s"].at[slot, j], barrier)
        else:

            @pl.when(i == 0)
            def _():
                scales = x_scale.at[pl.ds(first_row, rows)]
                of_rows = shared["scale_s"].at[pl.ds(0, rows)]
                plgpu.copy_gmem_to_smem(scales, of_rows, shared["ready"])

        return next_slot(slot, config.stages)

    lax.fori_loop(0, plan.steps, step, jnp.int32(0))
    if config.pdl and not plan.interpret:
        plgpu.griddepcontrol_launch_dependents()
    # int8's last stage is not handed back; the others are waited for before the block may end.
    last = plan.steps - (plan.dtype == jnp.int8)
    for i in range(max(0, plan.steps - config.stages), last):
        plgpu.barrier_wait(empty.at[i % config.stages])


def _compute(plan: _Plan, warpgroup, w_scale, out, mailbox, *, full, empty, **shared) -> None:
    """Multiply stage after stage, then reduce, scale and store."""
    config = plan.config
    multiply = _exactly if plan.dtype == jnp.int8 else _promoting
    sums = multiply(plan, warpgroup, w_scale, full, empty, **shared)
    part = lax.axis_index("part")
    if plan.ends:
        # Every block waits, or one could end while its copy is under way.
        plgpu.barrier_wait(shared["ready"])
    if config.split > 1:
        send(sums, part, warpgroup, mailbox, shared)

    @pl.when(part == 0)
    def _():
        total = sums
        if config.split > 1:
            total = receive(sums, config.split, warpgroup, mailbox, shared)
        y = _scaled(plan, total, warpgroup, **shared)
        # x was the transposed operand, so y^T is what the registers hold.
        staged = shared["out_s"].at[warpgroup]
        staged.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        first = lax.axis_index("n") * config.block_n + warpgroup * 64
        rows_out = pl.ds(lax.axis_index("m") * config.block_m, config.block_m)
        plgpu.copy_smem_to_gmem(staged, out.at[rows_out, pl.ds(first, 64)])
        plgpu.wait_smem_to_gmem(0)


def _scaled(plan: _Plan, total, warpgroup, **shared):
    """The sums [64, block_m] with scales and bias, rounded."""
    own = pl.ds(warpgroup * 64, 64)
    y = total.astype(jnp.float32)
    if not plan.block:
        scale_s = shared["scale_s"]
        x_scale = plgpu.load(scale_s.at[pl.ds(0, plan.config.block_m)], layout=COLUMNS)
        y = y * lax.broadcast_in_dim(x_scale, y.shape, [1])
        first = scale_rows(plan.config.block_m) + warpgroup * 64
        w_scale = plgpu.load(scale_s.at[pl.ds(first, 64)], layout=ROWS)
        y = y * lax.broadcast_in_dim(w_scale, y.shape, [0])
    if plan.bias is not None:
        bias = plgpu.load(shared["bias_s"].at[own], layout=ROWS).astype(jnp.float32)
        y = y + lax.broadcast_in_dim(bias, y.shape, [0])
    return y.astype(plan.out_dtype)


def _exactly(plan: _Plan, warpgroup, w_scale, full, empty, *, x_s, w_s, **_):
    """int32 sums: stage after stage is handed back once the next one is under way."""
    del w_scale
    config = plan.config
    own = pl.ds(warpgroup * 64, 64)

    def multiply(accumulator):
        def step(i, slot):
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(accumulator, w_s.at[slot, own], x_s.at[slot].T)
            plgpu.wgmma_wait(1)

            # All that read the stage before is done by now.
            @pl.when(i > 0)
            def _():
                plgpu.barrier_arrive(empty.at[previous_slot(slot, config.stages)])

            return next_slot(slot, config.stages)

        lax.fori_loop(0, plan.steps, step, jnp.int32(0))
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, config.block_m), jnp.int32))


def _promoting(plan: _Plan, warpgroup, w_scale, full, empty, *, x_s, w_s, scale_s, **_):
    """float32 sums of the tensor cores' sums over 128 inputs each."""
    config = plan.config
    shape = (64, config.block_m)
    own = pl.ds(warpgroup * 64, 64)
    first = lax.axis_index("part") * plan.steps * config.slices
    column = lax.axis_index("n") * config.block_n + warpgroup * 64

    def factor(slice_):
        """Of the weight's block; zeros follow the last one, whatever their factor."""
        row = lax.min(lax.div(column, SLICE), jnp.int32(plan.n // SLICE - 1))
        return w_scale[row, lax.min(slice_, jnp.int32(plan.k // SLICE - 1))]

    def step(i, carry):
        slot, total = carry
        slices = range(config.slices)
        # Read before the wait, which hides it.
        factors = [factor(first + i * config.slices + j) for j in slices if plan.block]
        plgpu.barrier_wait(full.at[slot])
        for j in slices:
            inputs = pl.ds(SLICE * j, SLICE)

            def multiply(accumulator, inputs=inputs):
                plgpu.wgmma(accumulator, w_s.at[slot, own, inputs], x_s.at[slot, :, inputs].T)
                return accumulator[...]

            sums = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape))
            if plan.block:
                rows = scale_s.at[slot, j, pl.ds(0, config.block_m)]
                scale = plgpu.load(rows, layout=COLUMNS) * factors[j]
                sums = sums * lax.broadcast_in_dim(scale, shape, [1])
            total = total + sums
        plgpu.barrier_arrive(empty.at[slot])
        return next_slot(slot, config.stages), total

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), FRAGMENT)
    _, total = lax.fori_loop(0, plan.steps, step, (jnp.int32(0), zeros))
    return total
