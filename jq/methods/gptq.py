"""GPTQ (Frantar et al., arXiv 2210.17323): rounding that compensates its own error.

The layer's error on its calibration inputs is sum_n e_n' H e_n with e = w - q [K, N] and H [K, K]
the sum of x x' over the tokens.  With H = R R', R upper triangular, that is a sum of squares over
the inputs k,

    R_kk^2 (e_k + sum_{j<k} U_jk e_j)^2,      U = R / diag(R)  (each column by its diagonal),

so quantizing in order, the best q_k is the grid point nearest to w_k + sum_{j<k} U_jk e_j.  These
are the same codes as the paper's (equations 2 and 3, Cholesky factor of the inverse Hessian), which
eliminates the inputs from a matrix it rewrites; here nothing is inverted, and every block of
weights is read and written once.

A group's scale is taken, as in the paper's released code, from the weights as they stand when the
group starts, all earlier errors compensated: w'_G = w_G - e_G, where U_GG' e_G = -c_G and c_G =
sum_{j<G} U_jG' e_j.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jq import grid
from jq.chunks import largest_divisor
from jq.errors import SpecError
from jq.methods import clip
from jq.methods.cholesky import cholesky
from jq.methods.rtn import Clip, weight_range
from jq.methods.solution import Solution
from jq.spec import QuantSpec

# A factorisation that fails is tried again with ten times the damping, this often.
MAX_DAMPING_TRIES = 6

# Inputs whose errors are summed at a time: enough to keep a matrix product busy.
PANEL = 1024

# GPUs would cut float32 operands to TF32 by default, and codes with them.
_dot = functools.partial(lax.dot, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Options of GPTQ.  Names follow AutoGPTQ and GPTQModel.

    damp_percent: damping added to H's diagonal, as a fraction of its mean.
    block_size: inputs handled between two matrix products; changes speed and rounding, not the
      method.
    desc_act: act order: quantize inputs in descending order of H's diagonal, and form groups in
      that order.  The stored rows are permuted and inference gathers its inputs.
    static_groups: with desc_act, keep groups where they are in the input and fix all scales
      beforehand.
    act_group_aware: GAR: order groups by their largest diagonal entry and the inputs inside each
      group; the groups stay where they are, so inference needs no gather.
    true_sequential: linears inside a block see inputs made by their quantized predecessors.
    clip: range of each group: "none", "mse" (least squared weight error) or "output" (least error
      of the group's part of the output).
    """

    damp_percent: float = 0.01
    block_size: int = 128
    desc_act: bool = False
    static_groups: bool = False
    act_group_aware: bool = False
    true_sequential: bool = True
    clip: Clip = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.damp_percent < 1:
            raise SpecError(f"damp_percent {self.damp_percent} is not in [0, 1)")
        if self.block_size < 1:
            raise SpecError(f"block_size {self.block_size} is not positive")
        if self.desc_act and self.act_group_aware:
            raise SpecError(
                "desc_act and act_group_aware are two orders of the same inputs: choose one, and "
                "switch off the other (--no-act-group-aware, act_group_aware=False)"
            )
        if self.static_groups and not self.desc_act:
            raise SpecError("static_groups changes nothing without desc_act")

    @property
    def needs_statistics(self) -> bool:
        return True


class GPTQInfo(NamedTuple):
    """What happened in a solve; scalars.

    loss: float32, sum_n e_n' H e_n with the damped H.
    damp: float32, the damping fraction that was used in the end.
    failed: bool, no damping made H positive definite and the weight was rounded to nearest.
    """

    loss: jax.Array
    damp: jax.Array
    failed: jax.Array


class HessianFactor(NamedTuple):
    """What a solve needs of the Hessian; it depends on the inputs only, not on the weights.

    order: int32 [K], the order in which inputs are quantized, or None.
    group_order: int32 [G], the order of the groups (GAR), or None.
    blocks: float32 [G, g, g], what clip "output" needs of the Gram matrix, None for other clips:
      each group's inputs, in that order, or for static groups in the weights' own.
    unit: float32 [K, K], U, upper triangular with ones on its diagonal.
    diagonal: float32 [K], of R = U diag(R), which has H + damping = R R' in that order.
    damp, failed: see `GPTQInfo`.
    """

    order: jax.Array | None
    group_order: jax.Array | None
    blocks: jax.Array | None
    unit: jax.Array
    diagonal: jax.Array
    damp: jax.Array
    failed: jax.Array


def gptq_quantize(
    w: jax.Array, gram: jax.Array, spec: QuantSpec, config: GPTQ
) -> tuple[Solution, GPTQInfo]:
    """Quantize a weight [K, N] given the Gram matrix [K, K] of its inputs.

    Args:
      w: any float dtype [K, N]; its outputs are independent of each other.
      gram: float32 [K, K], sum (or mean) of x x' over the calibration tokens.
      spec: the format; its group_size divides K.
      config: the options.
    Returns: the solution (with `order` for desc_act without static_groups) and what happened.
    """
    return gptq_solve(w, factor_hessian(gram, spec, config), spec, config)


@functools.partial(jax.jit, static_argnames=("spec", "config", "axis_name"))
def factor_hessian(
    gram: jax.Array, spec: QuantSpec, config: GPTQ, axis_name: str | None = None
) -> HessianFactor:
    """Order the inputs and factor the Hessian: once for all weights that share the inputs.

    axis_name: inside `jax.shard_map`, the mesh axis whose devices all have the Gram matrix, and
      share the work where it is large (see `jq.methods.cholesky`).
    """
    order, group_order = _processing_order(gram, spec, config)
    blocks = None
    if config.clip == "output":
        blocks = _group_blocks(gram, None if config.static_groups else order, spec)
    damp, unit, diagonal, failed = _damped_factor(gram, order, config.damp_percent, axis_name)
    return HessianFactor(order, group_order, blocks, unit, diagonal, damp, failed)


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def gptq_solve(
    w: jax.Array, hessian: HessianFactor, spec: QuantSpec, config: GPTQ
) -> tuple[Solution, GPTQInfo]:
    """`gptq_quantize` with the Hessian already factored."""
    w = w.astype(jnp.float32)
    solve = _solve_static if config.static_groups else _solve_dynamic
    solution, errors = solve(w, hessian, spec, config)
    loss = jnp.sum(jnp.square(hessian.diagonal[:, None] * _dot(hessian.unit.T, errors)))
    solution = _restore_rows(solution, hessian.order, hessian.group_order, spec, config)
    return solution, GPTQInfo(loss, hessian.damp, hessian.failed)


def _processing_order(
    gram: jax.Array, spec: QuantSpec, config: GPTQ
) -> tuple[jax.Array | None, jax.Array | None]:
    """(order of the inputs [K], order of the groups [G]); None where it is the identity."""
    importance = jnp.diagonal(gram)
    if config.desc_act:
        return jnp.argsort(-importance, stable=True), None
    if not config.act_group_aware:
        return None, None
    groups = importance.reshape(spec.num_groups(gram.shape[0]), -1)
    inside = jnp.argsort(-groups, axis=1, stable=True)
    group_order = jnp.argsort(-groups.max(axis=1), stable=True)
    order = inside + jnp.arange(groups.shape[0])[:, None] * groups.shape[1]
    return order[group_order].reshape(-1), group_order


def _group_blocks(gram: jax.Array, order: jax.Array | None, spec: QuantSpec) -> jax.Array:
    """[G, g, g]: the Gram matrix of each group's inputs, in processing order."""
    groups = spec.num_groups(gram.shape[0])
    if order is None:
        return clip.gram_blocks(gram, groups)
    inputs = order.reshape(groups, -1)
    return jax.vmap(lambda of: gram[of[:, None], of[None, :]])(inputs)


def _damped_factor(
    gram: jax.Array, order: jax.Array | None, damp_percent: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """U and diag(R) with H + damping = R R', R = U diag(R) upper triangular.

    JAX's Cholesky reports failure as NaN only: check, and try again with more damping.  If every
    try fails R is the identity, with which nothing is compensated: rounding to nearest.

    These matrices are a run's largest: as few as possible live at a time.

    Returns the damping fraction, U, diag(R), and whether all tries failed.
    """
    k = gram.shape[0]
    mean = jnp.mean(jnp.diagonal(gram))
    # Where no input is ever alive, any positive diagonal will do.
    mean = jnp.where(mean > 0, mean, 1.0)
    # The reversal of rows and columns turns the lower factor of the reversed H into an upper one
    # of H.
    backwards = jnp.arange(k)[::-1] if order is None else order[::-1]
    inputs = jnp.arange(k)

    def attempt(state):
        tries, damp, _ = state
        damp = jnp.where(tries == 0, damp, jnp.maximum(damp * 10, 1e-4))
        damped = gram[backwards][:, backwards].at[inputs, inputs].add(damp * mean)
        return tries + 1, damp, cholesky(damped, axis_name)

    start = (0, jnp.float32(damp_percent), jnp.full_like(gram, jnp.nan))
    _, damp, lower = lax.while_loop(
        lambda state: (state[0] <= MAX_DAMPING_TRIES) & _broken(jnp.diagonal(state[2])),
        attempt,
        start,
    )
    diagonal = jnp.diagonal(lower)[::-1]
    failed = _broken(diagonal)
    diagonal = jnp.where(failed, 1.0, diagonal)
    unit = jnp.where(failed, jnp.eye(k), lower[::-1, ::-1] / diagonal[None, :])
    return damp, unit, diagonal, failed


def _broken(diagonal: jax.Array) -> jax.Array:
    """Whether this is the diagonal of a factorisation that failed, which is NaN all over, or of
    infinite numbers.

    NaN > 0 is false.  Compared one by one: XLA's minimum of 4096 numbers and more takes no notice
    of NaN on a CPU.
    """
    return ~jnp.all((diagonal > 0) & (diagonal < jnp.inf))


def _solve_dynamic(w, hessian, spec, config):
    """Groups are runs of rows in processing order, their ranges those of compensated weights."""
    w = w if hessian.order is None else w[hessian.order]
    k, n = w.shape
    groups = spec.num_groups(k)
    size = k // groups

    def group(errors, g):
        start = g * size
        rows = lax.dynamic_slice_in_dim(w, start, size)
        u = lax.dynamic_slice_in_dim(hessian.unit, start, size, axis=1)
        triangle = lax.dynamic_slice_in_dim(u, start, size)
        pull, rows_now = None, rows
        if groups > 1:
            pull = _pull(u, errors, start)
            rows_now = rows + lax.linalg.triangular_solve(
                triangle, pull, left_side=True, lower=False, transpose_a=True, unit_diagonal=True
            )
        block = None if hessian.blocks is None else hessian.blocks[g][None]
        lo, hi = weight_range(rows_now[None], spec, config.clip, block)
        scale, zero = grid.scale_and_zero(lo[0], hi[0], spec)
        new, codes = _round_rows(
            rows, pull, triangle, lambda _: (scale[0], zero[0]), spec, config.block_size
        )
        errors = lax.dynamic_update_slice_in_dim(errors, new, start, axis=0)
        return errors, (codes, scale[0], zero[0])

    start = jnp.zeros((k, n), jnp.float32)
    errors, (codes, scale, zero) = lax.scan(group, start, jnp.arange(groups))
    return Solution(codes.reshape(k, n), scale, zero), errors


def _solve_static(w, hessian, spec, config):
    """Groups are runs of rows of the original weight, their ranges fixed before any rounding."""
    k = w.shape[0]
    order = hessian.order
    lo, hi = weight_range(grid.split_groups(w, spec), spec, config.clip, hessian.blocks)
    scale, zero = (a[:, 0] for a in grid.scale_and_zero(lo, hi, spec))
    group_of = order // (k // scale.shape[0])

    def row_grid(row):
        return scale[group_of[row]], zero[group_of[row]]

    errors, codes = _round_rows(w[order], None, hessian.unit, row_grid, spec, config.block_size)
    return Solution(codes, scale, zero), errors


def _pull(u: jax.Array, errors: jax.Array, done: jax.Array) -> jax.Array:
    """u' errors [R, N] for u [K, R] and errors [K, N] of which only the first `done` rows are made:
    the zeros after them, half of all products in the end, are left out panel by panel."""
    size = largest_divisor(errors.shape[0], PANEL)

    def add(panel, total):
        a, b = (lax.dynamic_slice_in_dim(part, panel * size, size) for part in (u, errors))
        return total + _dot(a.T, b)

    if size == errors.shape[0]:
        return _dot(u.T, errors)
    start = jnp.zeros((u.shape[1], errors.shape[1]), jnp.float32)
    return lax.fori_loop(0, (done + size - 1) // size, add, start)


def _round_rows(w, pull, unit, row_grid, spec, block_size):
    """Round rows in order, a block at a time.

    Args:
      w: [R, N], the rows as they were.
      pull: [R, N], what the errors of all rows before these ask for; None for nothing.
      unit: [R, R], how these pull each other.
      row_grid: row -> its scale [N] and zero point [N].
    Returns: the rows' errors w - q [R, N] and their codes [R, N].
    """
    count, n = w.shape
    size = largest_divisor(count, block_size)
    code_dtype = jnp.float8_e4m3fn if spec.is_float else jnp.uint8
    asked = w if pull is None else w + pull

    def block(errors, b):
        first = b * size
        u = lax.dynamic_slice_in_dim(unit, first, size, axis=1)
        within = lax.dynamic_slice_in_dim(u, first, size)
        rows = lax.dynamic_slice_in_dim(w, first, size)
        pulled = lax.dynamic_slice_in_dim(asked, first, size)
        if size < count:
            pulled += _pull(u, errors, first)

        def row(i, state):
            new, codes = state
            scale, zero = row_grid(first + i)
            code = grid.encode(pulled[i] + _dot(within[:, i], new), scale, zero, spec)
            error = rows[i] - grid.decode(code, scale, zero, spec)
            return new.at[i].set(error), codes.at[i].set(code)

        state = jnp.zeros((size, n), jnp.float32), jnp.zeros((size, n), code_dtype)
        new, codes = lax.fori_loop(0, size, row, state)
        return lax.dynamic_update_slice_in_dim(errors, new, first, axis=0), codes

    errors, codes = lax.scan(block, jnp.zeros((count, n), jnp.float32), jnp.arange(count // size))
    return errors, codes.reshape(count, n)


def _restore_rows(solution, order, group_order, spec, config):
    """Bring rows, and the groups of GAR, back to where storage wants them."""
    if order is None:
        return solution
    if config.desc_act and not config.static_groups and solution.scale.shape[0] > 1:
        return solution._replace(order=order.astype(jnp.int32))
    codes = solution.codes[jnp.argsort(order)]
    if group_order is None:
        return solution._replace(codes=codes)
    back = jnp.argsort(group_order)
    return Solution(codes, solution.scale[back], solution.zero[back])
