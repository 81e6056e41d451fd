"""The kernel of `quantize_rows`: a row, or some groups of 128, per block, held in registers.

Values are read once, compared with the largest of their row, and rounded where they lie.  Nothing
here is Hopper's own: one source serves sm_80 to sm_90.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jq.pallas_kernels.compat import (
    arith,
    fragmented_array,
    interpreter,
    ir,
    llvm,
    memref,
    pl,
    plgpu,
    vector,
)
from jq.pallas_kernels.quantize_rows import GROUP, TINY, vector_size
from jq.pallas_kernels.reference import smallest_step

# 1.5 * 2^23: added to a small number it leaves the nearest integer, ties to even, in the sum's low
# bits, in two's complement.
MAGIC = 0x4B400000
_MOST_GROUPS, _FEWEST_GROUPS = 32, 8  # of a block
_PAIRS = {"bfloat16": "bf16x2", "float16": "f16x2"}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One call: x [rows, k] in blocks of `tile` rows; more than one are groups."""

    rows: int
    k: int
    tile: int
    dtype: str
    codes: str
    epsilon: float | None
    interpret: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a block."""
        return (self.k,) if self.tile == 1 else (self.tile, self.k)

    @property
    def layout(self):
        """Of a block in registers."""
        if self.tile > 1:
            return group_layout(self.dtype)
        size = vector_size(self.k, self.dtype)
        return plgpu.Layout.WG_STRIDED(self.shape, vec_size=size)

    @property
    def name(self) -> str:
        name = f"quantize_rows_{self.dtype}_{self.codes}"
        return name + "_groups" * (self.tile > 1) + "_norm" * (self.epsilon is not None)


def group_layout(dtype: str):
    """Groups of 128 in registers: 16 bytes to a lane, a group to half a warp (float32: a warp)."""
    width = 16 // jnp.dtype(dtype).itemsize
    groups = 32 * width // GROUP
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4 * groups, GROUP), (groups, GROUP), (width,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2) if groups > 1 else (-2,),
        vector_dim=-1,
    )


def quantize(
    x: jax.Array, codes: str, gain: jax.Array | None, epsilon: float | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """x [M, K] -> (codes [M, K], scale float32 [M]); normalised before, where there is a gain."""
    plan = _Plan(x.shape[0], x.shape[1], 1, x.dtype.name, codes, epsilon, interpret)
    return _call(plan, x) if gain is None else _call(plan, x, gain)


def quantize_groups(x: jax.Array, codes: str, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """x [M, 128], any M -> (codes [M, 128], scale float32 [M])."""
    rows = x.shape[0]
    tile = _MOST_GROUPS
    while tile > _FEWEST_GROUPS and rows % tile:
        tile //= 2
    padded = jnp.pad(x, ((0, -rows % tile), (0, 0)))
    plan = _Plan(padded.shape[0], GROUP, tile, x.dtype.name, codes, None, interpret)
    result, scale = _call(plan, padded)
    return result[:rows], scale[:rows]


def _call(plan: _Plan, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=(
            jax.ShapeDtypeStruct((plan.rows, plan.k), jnp.dtype(plan.codes)),
            jax.ShapeDtypeStruct((plan.rows,), jnp.float32),
        ),
        grid=(plan.rows // plan.tile,),
        grid_names=("block",),
        interpret=interpreter(plan.interpret),
        kernel_name=plan.name,
    )(*inputs)


def _kernel(plan: _Plan, x, *rest) -> None:
    gain, codes, scales = rest if plan.epsilon is not None else (None, *rest)
    block = lax.axis_index("block")
    if plan.tile > 1:
        block = pl.ds(block * plan.tile, plan.tile)
    # "Optimized" is the path through shared memory.
    values: Any = plgpu.load(x.at[block], layout=plan.layout, optimized=plan.tile == 1)
    if gain is not None:
        values = _normalised(plan, values, plgpu.load(gain, layout=plan.layout))
    largest = jnp.max(jnp.abs(values), axis=-1).astype(jnp.float32)
    step = smallest_step(jnp.dtype(plan.codes))
    scale = jnp.where(largest < TINY, jnp.float32(1), largest * step)
    codes[block] = _encoded(plan, values.astype(jnp.float32), scale)
    if plan.tile == 1 or plan.interpret:
        scales[block] = scale
    else:
        _store_rows(plan)(scales.at[block], scale)


def _normalised(plan: _Plan, values, gain):
    """RMSNorm, rounded to the dtype of x."""
    wide = values.astype(jnp.float32)
    mean = jnp.sum(wide * wide) / jnp.float32(plan.k)
    wide = wide * lax.rsqrt(mean + jnp.float32(plan.epsilon)) * gain.astype(jnp.float32)
    pair = vector_size(plan.k, plan.dtype) > 1 and plan.dtype in _PAIRS
    return _narrowed(plan)(wide) if pair and not plan.interpret else wide.astype(plan.dtype)


def _encoded(plan: _Plan, values, scale):
    """Codes of values * (1 / scale); nothing is larger than the largest code by half a step."""
    inverse = lax.broadcast_in_dim(1 / scale, plan.shape, [0] if plan.tile > 1 else [])
    if plan.codes != "int8":
        return (values * inverse).astype(plan.codes)
    if plan.interpret:
        return jnp.round(values * inverse).astype(jnp.int8)
    return _rounded(plan)(values, plgpu.layout_cast(inverse, plan.layout))


def _rounded(plan: _Plan):
    """(values, factors) -> the int8 nearest to their products, in three instructions.

    Inline, since a compiler may turn a product and a sum into one operation that rounds once.
    """

    def rounded(values, factors):
        f32, i8, i32 = ir.F32Type.get(), *map(ir.IntegerType.get_signless, (8, 32))
        [size] = ir.VectorType(values.type).shape
        asm = f"{{ .reg .f32 q; mul.rn.f32 q, $1, $2; add.rn.f32 $0, q, 0f{MAGIC:08X}; }}"
        sums = [
            llvm.inline_asm(
                f32, [vector.extract(v, [], [i]) for v in (values, factors)], asm, "=f,f,f"
            )
            for i in range(size)
        ]
        words = [arith.bitcast(i32, each) for each in sums]
        return arith.trunci(
            ir.VectorType.get((size,), i8),
            vector.from_elements(ir.VectorType.get((size,), i32), words),
        )

    return _inline(plan, 2, jnp.int8, rounded)


def _narrowed(plan: _Plan):
    """float32 -> the dtype of x, two at a time: singly, conversions are a quarter as fast."""

    def narrow(wide):
        i32 = ir.IntegerType.get_signless(32)
        [size] = ir.VectorType(wide.type).shape
        half = ir.BF16Type.get() if plan.dtype == "bfloat16" else ir.F16Type.get()
        asm = f"cvt.rn.{_PAIRS[plan.dtype]}.f32 $0, $2, $1;"
        words = [
            llvm.inline_asm(i32, [vector.extract(wide, [], [i + j]) for j in (0, 1)], asm, "=r,f,f")
            for i in range(0, size, 2)
        ]
        packed = vector.from_elements(ir.VectorType.get((size // 2,), i32), words)
        return vector.bitcast(ir.VectorType.get((size,), half), packed)

    return _inline(plan, 1, jnp.dtype(plan.dtype), narrow)


def _inline(plan: _Plan, arguments: int, dtype, function) -> Any:
    """`function` of the vectors that a thread holds, for every one of them."""
    signed = True if jnp.issubdtype(dtype, jnp.integer) else None

    @plgpu.inline_mgpu(
        arg_types=(plan.layout,) * arguments,
        return_type=plgpu.ShapeDtypeStruct(plan.shape, dtype, plan.layout),
    )
    def apply(_, *arrays):
        registers = np.empty_like(arrays[0].registers)
        for index in np.ndindex(*registers.shape):
            registers[index] = function(*(array.registers[index] for array in arrays))
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=arrays[0].layout, _is_signed=signed
        )

    return apply


def _store_rows(plan: _Plan) -> Any:
    """Store a value per group; the lanes of a group write the same.

    JAX 0.12 stores no such fragments by itself: they fill no sector of 32 bytes.
    """
    layout = plan.layout.reduce(1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_, target, rows):
        places = rows.layout.thread_idxs(rows.shape)
        for register, place in zip(rows.registers.flat, places, strict=True):
            memref.store(vector.extract(register, [], [0]), target, place)

    return store
