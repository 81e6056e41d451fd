"""What the kernels' schedules share: the ring of stages, and the sum over a cluster's blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jq.pallas_kernels.compat import FRAGMENT, pl, plgpu


def next_slot(slot: jax.Array, stages: int) -> jax.Array:
    """Carried, not computed from the step: a remainder would keep wgmma's descriptors out of the
    uniform registers, and the assembler would serialize it."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def previous_slot(slot: jax.Array, stages: int) -> jax.Array:
    return lax.select(slot == 0, jnp.int32(stages - 1), slot - 1)


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
