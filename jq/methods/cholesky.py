"""A Cholesky factorisation that the devices along a mesh axis share, or that is too large for
libraries.

Left-looking, by blocks of rows.  With L the lower factor of A and blocks of `b` rows, step j makes
block column j: every device hears row j from its owner, all factor the diagonal block

    L_jj L_jj' = A_jj - sum_{k<j} L_jk L_jk',

whose sum they share, and each makes the blocks that lie below in its own rows,

    L_ij = (A_ij - sum_{k<j} L_ik L_jk') L_jj'^-1.

Row i costs i^2; owners are dealt out back and forth from the last row on, so that all have about
the same to do.  What a device hears of the others' rows is what it needs of them in the end: the
factor is on every device, and no device holds more than one matrix of its size.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import lax

from jq.chunks import largest_divisor

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# From this size on the factor is shared: a smaller one takes no longer than the messages would.
SHARED_FROM = 8192
# The most rows of a matrix whose entries can be counted in 32 bits, as cuSOLVER and LAPACK may do.
# Models of 70 billion weights have fewer inputs, OPT-175B (49152) and Llama-405B (53248) have more.
LIBRARY_ROWS = 46340
# Rows of a block: fewer would leave the products too small, more the last ones to few devices.
BLOCK = 512
# Columns that are multiplied at a time.
PANEL = 1024

_dot = functools.partial(lax.dot, precision=lax.Precision.HIGHEST)


def cholesky(matrix: Float[Array, "K K"], axis_name: str | None) -> Float[Array, "K K"]:
    """The lower factor of a positive definite matrix, whose upper triangle changes nothing.

    axis_name: inside `jax.shard_map`, the mesh axis whose devices all have the matrix, and share
      the work where it is large.
    Returns: the factor, on every device; NaN where there is none.
    """
    size = block_rows(matrix.shape[0], 1 if axis_name is None else lax.axis_size(axis_name))
    if size is None:
        return lax.linalg.cholesky(matrix, symmetrize_input=False)
    return blocked_cholesky(matrix, axis_name, size)


def block_rows(k: int, devices: int) -> int | None:
    """Rows of a block of a matrix [K, K]; None where every device gives it to a library whole."""
    size = largest_divisor(k, BLOCK)
    large = k >= SHARED_FROM if devices > 1 else k > LIBRARY_ROWS
    return size if large and size >= BLOCK // 4 else None


def owners(count: int, devices: int) -> np.ndarray:
    """int32 [count], the device that makes each of the block rows."""
    turn = np.arange(count)[::-1] % (2 * devices)
    return np.minimum(turn, 2 * devices - 1 - turn).astype(np.int32)


def products(k: int, devices: int) -> float:
    """Operations of the device that has most to do."""
    size = block_rows(k, devices)
    if size is None or devices == 1:
        return k**3 / 3
    count = k // size
    before, width = np.arange(count), _panel(count) * size
    seen = -(-before * size // width) * width  # columns multiplied for each block of a column
    # Of each block row: its products with the rows above, which it is divided by; then the squares,
    # which are shared, and the corners, which are not.
    row = np.array([(2.0 * size**2 * seen[:i]).sum() + i * float(size) ** 3 for i in before])
    busiest = np.bincount(owners(count, devices), weights=row).max()
    squares = (2.0 * size**2 * width * -(-(seen // width) // devices)).sum()
    return float(busiest + squares + count * size**3 / 3)


def _panel(count: int) -> int:
    """Blocks whose columns are multiplied at a time."""
    return largest_divisor(count, PANEL // BLOCK)


def blocked_cholesky(
    matrix: Float[Array, "K K"], axis_name: str | None, size: int
) -> Float[Array, "K K"]:
    """The lower factor; NaN from where on the matrix has none.

    matrix: the same on all devices along `axis_name`, inside `jax.shard_map`.
    size: rows of a block, which divide K.
    Exchanges, for each of the K / size blocks: an all-reduce of [size, K] and one of [size, size].
    """
    k = matrix.shape[0]
    count, devices, me = k // size, 1, 0
    if axis_name is not None:
        devices, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    owner = owners(count, devices)
    width = _panel(count) * size
    # Each device's rows, in ascending order behind as many -1 as the others have more.
    most = int(np.bincount(owner).max())
    table = np.full((devices, most), -1, np.int32)
    for device in range(devices):
        rows = np.flatnonzero(owner == device)
        table[device, most - len(rows) :] = rows
    own, owner = jnp.asarray(table)[me], jnp.asarray(owner)

    def told(part):
        return part if axis_name is None else lax.psum(part, axis_name)

    def product(a, b, first, step, panels):
        """Sum of a_p b_p' over every step-th of the first panels p."""

        def add(turn, total):
            start = (first + turn * step) * width
            return total + _dot(
                lax.dynamic_slice_in_dim(a, start, width, axis=1),
                lax.dynamic_slice_in_dim(b, start, width, axis=1).T,
            )

        turns = (panels - first + step - 1) // step
        return lax.fori_loop(0, turns, add, jnp.zeros((size, size), matrix.dtype))

    def column(j, lower):
        start = j * size
        panels = (start + width - 1) // width
        row = lax.dynamic_slice_in_dim(lower, start, size)
        row = told(jnp.where(owner[j] == me, row, 0.0))
        square = lax.dynamic_slice_in_dim(row, start, size, axis=1)
        # What is not made yet must not be multiplied.
        row = jnp.where(jnp.arange(k)[None, :] < start, row, 0.0)
        square -= told(product(row, row, me, devices, panels))
        corner = lax.linalg.cholesky(square, symmetrize_input=False)
        row = lax.dynamic_update_slice_in_dim(row, corner, start, axis=1)
        done = lax.dynamic_update_slice_in_dim(row, jnp.zeros_like(corner), start, axis=1)

        def below(place, lower):
            i = own[place] * size
            rows = lax.dynamic_slice_in_dim(lower, i, size)
            asked = lax.dynamic_slice_in_dim(rows, start, size, axis=1)
            asked -= product(rows, done, 0, 1, panels)
            made = lax.linalg.triangular_solve(
                corner, asked, left_side=False, lower=True, transpose_a=True
            )
            return lax.dynamic_update_slice(lower, made, (i, start))

        lower = lax.dynamic_update_slice_in_dim(lower, row, start, axis=0)
        return lax.fori_loop(jnp.sum(own <= j), most, below, lower)

    return lax.fori_loop(0, count, column, matrix)
