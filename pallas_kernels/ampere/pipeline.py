"""What both kernels are made of: copies that run ahead of the products, and stores of whole rows.

Ampere has no barrier that a copy arrives at, and no thread of its own to copy: every thread of a
block issues its share of a stage's copies (`cp.async`), multiplies what has landed, and waits.
Blocks are one warpgroup each, several of them on a multiprocessor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq.pallas_kernels.ampere.config import Sizes
from jq.pallas_kernels.compat import mgpu, nvvm, pl, plgpu, store_to_global

# Copies are not predicated: what is copied has to be there.
IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
# Barriers are where this module puts them: one for each stage, one after the last, and that of
# `store`.
COMPILER = plgpu.CompilerParams(
    approx_math=True,
    unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


def copy(source, destination) -> None:
    """Start to copy global memory into shared memory: one group of `cp.async`."""
    plgpu.copy_gmem_to_smem(source, destination, oob_mode=IN_BOUNDS)


def commit_nothing() -> None:
    """An empty group, that waiting can count where nothing is left to copy."""

    @plgpu.inline_mgpu()
    def group(_) -> None:
        nvvm.cp_async_commit_group()

    group()  # pyright: ignore[reportCallIssue]


def barrier() -> None:
    """Of the block: shared memory written before it can be read after it."""

    @plgpu.inline_mgpu()
    def wait(_) -> None:
        mgpu.warpgroup_barrier()

    wait()  # pyright: ignore[reportCallIssue]


def run(
    sizes: Sizes,
    first,
    end,
    issue: Callable[[Any, Any], None],
    step: Callable[[Any, Any, Any], Any],
    carry: Any,
) -> Any:
    """Multiply stage `first` to `end - 1`, with `sizes.stages - 1` of them being copied meanwhile.

    issue: (stage, slot): starts `sizes.copies` copies into a slot of shared memory.
    step: (stage, slot, carry) -> carry: multiplies what is in the slot.
    Returns: the last carry; by then no thread reads the slots any more, and nothing is copied.
    """
    ahead = sizes.stages - 1

    def fill(stage, slot):
        pl.when(stage < end)(lambda: issue(stage, slot))

        @pl.when(stage >= end)
        def _():
            for _ in range(sizes.copies):
                commit_nothing()

    def body(stage, state):
        slot, carry = state
        # This stage has landed, for all threads, and all of them have read the one before it,
        # whose slot is filled again.
        plgpu.wait_gmem_to_smem(sizes.copies * (ahead - 1))
        fill(stage + ahead, lax.select(slot == 0, jnp.int32(ahead), slot - 1))
        carry = step(stage, slot, carry)
        return lax.select(slot == ahead, jnp.int32(0), slot + 1), carry

    for i in range(ahead):
        fill(first + i, jnp.int32(i))
    _, carry = lax.fori_loop(first, end, body, (jnp.int32(0), carry))
    barrier()
    return carry


def share(part, parts: int, steps: int):
    """(first, end) of a part's steps, where `parts` blocks share them."""
    return lax.div(part * steps, jnp.int32(parts)), lax.div((part + 1) * steps, jnp.int32(parts))


def padded(rows: jax.Array, multiple: int) -> jax.Array:
    """Rows of zeros after `rows`, up to a multiple: nothing else stops a copy at the end."""
    missing = -rows.shape[0] % multiple
    return jnp.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1))) if missing else rows


def store(staged, out, swizzle: int) -> None:
    """Bring a tile of shared memory to global memory in whole rows, after a barrier."""
    barrier()
    layout = plgpu.Layout.SMEM_GMEM_COPY(staged.shape, staged.dtype, swizzle=swizzle)
    store_to_global(out, plgpu.load(staged, layout=layout, optimized=False))
