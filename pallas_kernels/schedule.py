"""What the schedules share: the ring of stages, a launch of clusters, the sum over their blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq.pallas_kernels.compat import FRAGMENT, interpreter, pl, plgpu, swizzled


def next_slot(slot: jax.Array, stages: int) -> jax.Array:
    """Carried, not computed from the step: a remainder would keep wgmma's descriptors out of the
    uniform registers, and the assembler would serialize it."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def previous_slot(slot: jax.Array, stages: int) -> jax.Array:
    return lax.select(slot == 0, jnp.int32(stages - 1), slot - 1)


def launch(
    kernel: Callable[..., None],
    plan: Any,
    inputs: Sequence[jax.Array],
    scratch: dict[str, Any],
    dtypes: tuple[Any, Any],
    name: str,
) -> jax.Array:
    """Run a decode kernel on its clusters: one per block of columns ("n") and of rows ("m").

    kernel: called with the plan, the inputs, the result, perhaps a mailbox (see `send`), and the
      scratch memory by name; a warpgroup more than the config's runs it.
    plan: of the call; has config, m, n, partials (see `cluster_memory`) and interpret.
    dtypes: of the result and of the sums.
    Returns: [m, n].
    """
    config = plan.config
    blocks = (math.ceil(plan.n / config.block_n), math.ceil(plan.m / config.block_m))
    out = [jax.ShapeDtypeStruct((plan.m, plan.n), dtypes[0])]
    if plan.interpret and config.split > 1:
        out.append(jax.ShapeDtypeStruct((*blocks, *plan.partials), dtypes[1]))
    return plgpu.kernel(
        functools.partial(kernel, plan),
        out_type=tuple(out),
        scratch_types=scratch,
        grid=blocks,
        grid_names=("n", "m"),
        cluster=(config.split,),
        cluster_names=("part",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter(plan.interpret),
        kernel_name=name,
    )(*inputs)[0]


def cluster_memory(partials: tuple[int, ...], dtype, interpret: bool) -> dict[str, Any]:
    """The shared memory and barriers of `send` and `receive`; nothing where there is no cluster.

    partials: [split - 1, warpgroups, columns, rows], what its other blocks send to its first.
    """
    others, warpgroups = partials[:2]
    if not others:
        return {}
    swizzle = min(128, 4 * partials[-1])
    if not interpret:
        return {
            "partials_s": swizzled(partials, dtype, swizzle),
            "partials_in": plgpu.Barrier(num_arrivals=others * warpgroups),
        }
    return {
        "partials_out": swizzled(partials[1:], dtype, swizzle),
        "posted": plgpu.ClusterBarrier(collective_axes=("part",), num_arrivals=warpgroups),
    }


def send(sums, part, warpgroup, mailbox, shared) -> None:
    """Bring this block's sums to the first block of the cluster ("part").

    shared: `partials_s` [split - 1, warpgroups, ...] and the barrier `partials_in`; interpreted,
      `partials_out` [warpgroups, ...] and the cluster's barrier `posted`.
    mailbox: interpreted only, global memory [n, m, split - 1, warpgroups, ...]; the interpreter
      cannot store to another block's shared memory.
    """
    if mailbox is None:

        @pl.when(part > 0)
        def _():
            plgpu.async_store_smem(
                sums,
                shared["partials_s"].at[part - 1, warpgroup],
                shared["partials_in"],
                cluster_idx=jnp.int32(0),
                cluster_dim="part",
            )

        return

    @pl.when(part > 0)
    def _():
        staged = shared["partials_out"].at[warpgroup]
        staged[...] = sums
        plgpu.commit_smem()
        box = mailbox.at[lax.axis_index("n"), lax.axis_index("m"), part - 1, warpgroup]
        plgpu.copy_smem_to_gmem(staged, box)
        plgpu.wait_smem_to_gmem(0)

    plgpu.barrier_arrive(shared["posted"])
    plgpu.barrier_wait(shared["posted"])


def receive(sums, split: int, warpgroup, mailbox, shared):
    """Add the other blocks' sums to the first block's, in their order."""
    if mailbox is None:
        plgpu.barrier_wait(shared["partials_in"])
    for i in range(split - 1):
        if mailbox is None:
            sums = sums + plgpu.load(shared["partials_s"].at[i, warpgroup], layout=FRAGMENT)
        else:
            sums = sums + mailbox[lax.axis_index("n"), lax.axis_index("m"), i, warpgroup]
    return sums
