"""8-bit activations times an 8-bit weight, on Ampere (int8) and Ada (int8 and float8).

A block of one warpgroup multiplies `block_m` rows and `block_n` columns with mma.m16n8k32: few
rows are shared by its four warps, which take their own columns; more are shared by two of them.
int8 sums are exact.  Ada's tensor cores add float8 products in fewer bits than float32 has, so
every 128 inputs (or every stage, where that is less) their sums are added to others in float32.

With `split` the blocks of a tile share its inputs and leave their sums for XLA to add.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jq.pallas_kernels.ampere import pipeline
from jq.pallas_kernels.ampere.config import Sizes, W8Config
from jq.pallas_kernels.ampere.tuning import choose_w8, unsuitable_w8
from jq.pallas_kernels.compat import pl, plgpu, swizzled
from jq.pallas_kernels.weight8 import BLOCK, W8Weight

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Shaped

COLUMNS = 64  # that are multiplied at once
SLICE = 64  # inputs


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call; m is a multiple of block_m, n of block_n, k of a stage's inputs.

    out: dtype of the result.
    """

    config: W8Config
    dtype: str
    block: int | None
    bias: bool
    out: str
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        block = "_block" if self.block else ""
        return f"w8a8_ampere_{self.config.name}_{self.dtype}{block}" + "_bias" * self.bias

    @property
    def grid(self) -> tuple[int, int]:
        return self.m // self.config.block_m, self.n // self.config.block_n

    @property
    def inputs(self) -> int:
        """Of a stage."""
        return SLICE * self.config.slices

    @property
    def steps(self) -> int:
        return self.k // self.inputs

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.config.stages, copies=2)

    @property
    def exact(self) -> bool:
        return self.dtype == "int8"

    @property
    def promoted(self) -> int:
        """Slices whose products the tensor cores add before float32 does."""
        return min(self.config.slices, BLOCK // SLICE)

    @property
    def sums(self) -> jnp.dtype:
        return jnp.dtype(jnp.int32 if self.exact else jnp.float32)

    @property
    def row_warps(self) -> int:
        """Of the four warps, how many divide the rows; the others divide the columns."""
        return 1 if self.config.block_m == 16 else 2

    @property
    def swizzle(self) -> int:
        """Of x: a copy takes at least four tiles of 8 rows x swizzle bytes."""
        return 32 if self.config.block_m == 16 and self.config.slices == 1 else 64

    @property
    def out_swizzle(self) -> int:
        config = self.config
        if config.split > 1:
            return 32
        narrow = config.block_m == 16 and config.block_n == 64
        return 64 if narrow else 128

    def layout(self, operand: Any) -> Any:
        """A layout of mma's, for this plan's distribution of the warps."""
        return operand(jnp.dtype(self.dtype), m_warps=self.row_warps)

    @property
    def result(self) -> Any:
        return self.layout(plgpu.Layout.MMA_ACC)


def w8a8_ampere(
    x_codes: Shaped[Array, "M K"],
    x_scale: Float32[Array, "..."],
    w: W8Weight,
    *,
    bias: Float[Array, " N"] | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: W8Config | None = None,
    compute_capability: tuple[int, int] = (8, 0),
) -> Float[Array, "M N"]:
    """y = (x_codes @ w.codes^T) * scales + bias, rounded once to `out_dtype`
    (`jq.pallas_kernels.w8a8.w8a8` checks and reshapes).

    Args:
      x_codes: int8, or (on compute capability 8.9) float8_e4m3fn, as the weight's, [M, K].
      x_scale: float32 [M], or [M, K/128] where the weight's scales are per block.
      w: the weight, of logical shape [K, N].
      bias: [N], bfloat16, float16 or float32; added in float32.
      out_dtype: bfloat16 or float16.
      config: tile sizes; None: the fastest estimated for the shape (see `tuning`).
      compute_capability: (8, 0), (8, 6) or (8, 9).
    Returns: `out_dtype` [M, N].  int8 products are summed exactly; float8 products by the tensor
      cores over 128 inputs at most, and those sums in float32.
    Raises: ValueError for a config that does not suit the weight or the device.
    """
    m, dtype = x_codes.shape[0], w.dtype.name
    config = config or choose_w8(m, w.k, w.n, dtype, w.block, compute_capability)
    if reason := unsuitable_w8(config, w.k, w.n, dtype, w.block, compute_capability):
        raise ValueError(reason)
    x, scale = (pipeline.padded(a, config.block_m) for a in (x_codes, x_scale))
    if bias is not None:
        bias = bias.astype(jnp.float32)
    return multiply(x, scale.T, w, bias, out_dtype, config)[:m]


def multiply(
    x: jax.Array,
    x_scale: jax.Array,
    w: W8Weight,
    bias: jax.Array | None,
    out: Any,
    config: W8Config,
) -> jax.Array:
    """x [M, K] @ w [K, N], scaled -> [M, N] in the dtype `out`; sizes are the config's multiples.

    x_scale: float32 [M], or [K/128, M] where the weight has scales per block.  bias: float32 [N].
    """
    product = launch(x, x_scale, w, bias, out, config)
    if config.split == 1:
        return product
    y = jnp.sum(product, 0, dtype=product.dtype).astype(jnp.float32)
    if w.block is None:
        y = y * x_scale[:, None] * w.scale[None, :]
    if bias is not None:
        y = y + bias[None, :]
    return y.astype(out)


def launch(
    x: jax.Array,
    x_scale: jax.Array,
    w: W8Weight,
    bias: jax.Array | None,
    out: Any,
    config: W8Config,
) -> jax.Array:
    """The kernel alone: the product, or each part's sums, int32 or float32 [split, M, N]."""
    m, n = x.shape[0], w.n
    dtype, result = w.dtype.name, jnp.dtype(out).name
    plan = Plan(config, dtype, w.block, bias is not None, result, m, n, w.k)
    split = config.split > 1
    # What is split is scaled when it is added up, but for scales of blocks, which differ.
    scales = [x_scale, w.scale] if not split or w.block else []
    bias_in = [] if bias is None or split else [bias]
    shape = (config.split, m, n) if split else (m, n)
    return plgpu.kernel(
        functools.partial(kernel, plan),
        out_type=jax.ShapeDtypeStruct(shape, plan.sums if split else out),
        scratch_types=_shared_memory(plan),
        grid=(config.split, math.prod(plan.grid)),
        grid_names=("part", "tile"),
        compiler_params=pipeline.COMPILER,
        kernel_name=plan.name,
    )(x, w.codes, *scales, *bias_in)


def _shared_memory(plan: Plan) -> dict:
    """What is copied and, when that is done with, what is stored."""
    config, dtype = plan.config, jnp.dtype(plan.dtype)
    out = plan.sums if config.split > 1 else jnp.dtype(plan.out)
    x_s = swizzled((config.stages, config.block_m, plan.inputs), dtype, plan.swizzle)
    w_s = swizzled((config.stages, config.block_n, plan.inputs), dtype, 64)
    out_s = swizzled((config.block_m, config.block_n), out, plan.out_swizzle)
    return {"shared": plgpu.RefUnion((x_s, w_s), out_s)}


def kernel(plan: Plan, x, w, *rest, shared) -> None:
    """What a block does."""
    *scales, out = rest
    (x_s, w_s), out_s = shared
    config = plan.config
    part = lax.axis_index("part")
    m, n = plgpu.planar_snake(lax.axis_index("tile"), plan.grid, 0, config.snake)
    rows = pl.ds(m * config.block_m, config.block_m)
    columns = pl.ds(n * config.block_n, config.block_n)
    first, end = pipeline.share(part, config.split, plan.steps)

    def issue(stage, slot):
        inputs = pl.ds(stage * plan.inputs, plan.inputs)
        pipeline.copy(x.at[rows, inputs], x_s.at[slot])
        pipeline.copy(w.at[columns, inputs], w_s.at[slot])

    def factors_of(stage):
        """Of each 128 inputs of a stage: what the rows' sums are multiplied by."""
        if plan.block is None:
            return ()
        x_scale, w_scale = scales[:2]
        first_block = stage * (plan.inputs // BLOCK)
        column = lax.div(n * config.block_n, jnp.int32(BLOCK))
        return tuple(
            plgpu.load(
                x_scale.at[first_block + b, rows], layout=plan.result.reduce(1), optimized=False
            )
            * w_scale[column, first_block + b]
            for b in range(plan.inputs // BLOCK)
        )

    def step(stage, slot, carry):
        sums, factors = carry
        following = factors_of(lax.min(stage + 1, end - 1))
        for i in range(config.slices // plan.promoted):
            factor = factors[i] if plan.block else None
            slices = range(i * plan.promoted, (i + 1) * plan.promoted)
            sums = _add(plan, sums, factor, [_slice(plan, x_s, w_s, slot, j) for j in slices])
        return sums, following

    zeros = tuple(_zeros(plan) for _ in range(config.block_n // COLUMNS))
    sums, _ = pipeline.run(plan.sizes, first, end, issue, step, (zeros, factors_of(first)))
    for c, total in enumerate(sums):
        y = total
        if config.split == 1:
            y = _scaled(plan, total, rows, n * config.block_n + c * COLUMNS, *scales)
        out_s.at[:, pl.ds(c * COLUMNS, COLUMNS)][...] = y
    target = out.at[part, rows, columns] if config.split > 1 else out.at[rows, columns]
    pipeline.store(out_s, target, plan.out_swizzle)


def _zeros(plan: Plan):
    return plgpu.layout_cast(jnp.zeros((plan.config.block_m, COLUMNS), plan.sums), plan.result)


def _spread(plan: Plan, values, axis: int):
    """One value for each row (axis 0) or column (1), for all sums of it."""
    shape = (plan.config.block_m, COLUMNS)
    return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, [axis]), plan.result)


def _slice(plan: Plan, x_s, w_s, slot, j: int):
    """(rows of x, a function that loads some columns of w) of a slice."""
    inputs = pl.ds(j * SLICE, SLICE)
    left = plgpu.load(x_s.at[slot, :, inputs], layout=plan.layout(plgpu.Layout.MMA_LHS))

    def right(c):
        part = w_s.at[slot, pl.ds(c * COLUMNS, COLUMNS), inputs]
        return plgpu.load(part.T, layout=plan.layout(plgpu.Layout.MMA_RHS))

    return left, right


def _add(plan: Plan, sums, factor, slices):
    """sums plus the products of some slices, of all columns."""
    found = []
    for c, total in enumerate(sums):
        products = total if plan.exact else _zeros(plan)
        for left, right in slices:
            products = plgpu.mma(products, left, right(c))
        if factor is not None:
            products = products * _spread(plan, factor, 0)
        found.append(products if plan.exact else total + products)
    return tuple(found)


def _scaled(plan: Plan, sums, rows, first, *scales):
    """sums of the columns from `first` on, times their scales, plus the bias."""
    columns = pl.ds(first, COLUMNS)
    y = sums.astype(jnp.float32)

    def spread(array, where, axis):
        layout = plan.result.reduce(1 - axis)
        values = plgpu.load(array.at[where], layout=layout, optimized=False)
        return _spread(plan, values, axis)

    if plan.block is None:
        y = y * spread(scales[0], rows, 0) * spread(scales[1], columns, 1)
    if plan.bias:
        y = y + spread(scales[2], columns, 1)
    return y.astype(plan.out)
