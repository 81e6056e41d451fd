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
from jq.errors import SpecError
from jq.methods.rtn import Clip, weight_range
from jq.methods.solution import Solution
from jq.spec import QuantSpec

# A factorisation that fails is tried again with ten times the damping, this often.
MAX_DAMPING_TRIES = 6

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
                "desc_act and act_group_aware are two orders of the same inputs: choose one"
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
    gram: float32 [K, K], undamped, in that order.
    root: float32 [K, K], upper triangular R with gram + damping = R R'.
    damp, failed: see `GPTQInfo`.
    """

    order: jax.Array | None
    group_order: jax.Array | None
    gram: jax.Array
    root: jax.Array
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


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def factor_hessian(gram: jax.Array, spec: QuantSpec, config: GPTQ) -> HessianFactor:
    """Order the inputs and factor the Hessian: once for all weights that share the inputs."""
    order, group_order = _processing_order(gram, spec, config)
    permuted = gram if order is None else gram[order][:, order]
    damp, root, failed = _damped_root(permuted, config.damp_percent)
    return HessianFactor(order, group_order, permuted, root, damp, failed)


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def gptq_solve(
    w: jax.Array, hessian: HessianFactor, spec: QuantSpec, config: GPTQ
) -> tuple[Solution, GPTQInfo]:
    """`gptq_quantize` with the Hessian already factored."""
    w = w.astype(jnp.float32)
    unit = hessian.root / jnp.diagonal(hessian.root)[None, :]
    solve = _solve_static if config.static_groups else _solve_dynamic
    solution, errors = solve(w, hessian, unit, spec, config)
    loss = jnp.sum(jnp.square(_dot(hessian.root.T, errors)))
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


def _damped_root(gram: jax.Array, damp_percent: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R upper triangular with H + damping = R R'.

    JAX's Cholesky reports failure as NaN only: check, and try again with more damping.  If every
    try fails R is the identity, with which nothing is compensated: rounding to nearest.

    Returns the damping fraction, R, and whether all tries failed.
    """
    mean = jnp.mean(jnp.diagonal(gram))
    # Where no input is ever alive, any positive diagonal will do.
    mean = jnp.where(mean > 0, mean, 1.0)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)

    def factor(damp):
        damped = gram + damp * mean * eye
        # The reversal of rows and columns turns the lower factor of the reversed H into an upper
        # one of H.
        return lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]

    def attempt(state):
        tries, damp, _ = state
        damp = jnp.where(tries == 0, damp, jnp.maximum(damp * 10, 1e-4))
        return tries + 1, damp, factor(damp)

    start = (0, jnp.float32(damp_percent), jnp.full_like(gram, jnp.nan))
    _, damp, root = lax.while_loop(
        lambda state: (state[0] <= MAX_DAMPING_TRIES) & _broken(jnp.diagonal(state[2])),
        attempt,
        start,
    )
    failed = _broken(jnp.diagonal(root))
    return damp, jnp.where(failed, eye, jnp.triu(root)), failed


def _broken(diagonal: jax.Array) -> jax.Array:
    """Whether this is the diagonal of a factorisation that failed, which is NaN all over.

    NaN > 0 is false.  Compared one by one: XLA's minimum of 4096 numbers and more takes no notice
    of NaN on a CPU.
    """
    return ~jnp.all(diagonal > 0)


def _largest_divisor(size: int, limit: int) -> int:
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)


def _solve_dynamic(w, hessian, unit, spec, config):
    """Groups are runs of rows in processing order, their ranges those of compensated weights."""
    w = w if hessian.order is None else w[hessian.order]
    k, n = w.shape
    groups = spec.num_groups(k)
    size = k // groups

    def group(errors, g):
        start = g * size
        rows = lax.dynamic_slice_in_dim(w, start, size)
        u = lax.dynamic_slice_in_dim(unit, start, size, axis=1)
        triangle = lax.dynamic_slice_in_dim(u, start, size)
        pull, rows_now = None, rows
        if groups > 1:
            pull = _dot(u.T, errors)
            rows_now = rows + lax.linalg.triangular_solve(
                triangle, pull, left_side=True, lower=False, transpose_a=True, unit_diagonal=True
            )
        block = lax.dynamic_slice(hessian.gram, (start, start), (size, size))
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


def _solve_static(w, hessian, unit, spec, config):
    """Groups are runs of rows of the original weight, their ranges fixed before any rounding."""
    k = w.shape[0]
    order, back = hessian.order, jnp.argsort(hessian.order)
    gram = hessian.gram[back][:, back] if config.clip == "output" else None
    lo, hi = weight_range(grid.split_groups(w, spec), spec, config.clip, gram)
    scale, zero = (a[:, 0] for a in grid.scale_and_zero(lo, hi, spec))
    group_of = order // (k // scale.shape[0])

    def row_grid(row):
        return scale[group_of[row]], zero[group_of[row]]

    errors, codes = _round_rows(w[order], None, unit, row_grid, spec, config.block_size)
    return Solution(codes, scale, zero), errors


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
    size = _largest_divisor(count, block_size)
    code_dtype = jnp.float8_e4m3fn if spec.is_float else jnp.uint8
    asked = w if pull is None else w + pull

    def block(errors, b):
        first = b * size
        u = lax.dynamic_slice_in_dim(unit, first, size, axis=1)
        within = lax.dynamic_slice_in_dim(u, first, size)
        rows = lax.dynamic_slice_in_dim(w, first, size)
        pulled = lax.dynamic_slice_in_dim(asked, first, size)
        if size < count:
            pulled += _dot(u.T, errors)

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
