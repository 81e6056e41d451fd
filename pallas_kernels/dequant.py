"""From packed words to the A operand of wgmma, in registers (see `weight` for the arithmetic).

Eight codes cost one shift, four ANDs (a nibble in the low bits of a half-word already is a number)
and four packed FMAs; with zero points four packed multiplications more.  The masks 0x000f000f and
0x00f000f0 take two nibbles each, the latter 16 times too large: its multiplier is 16 times smaller.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jq.pallas_kernels import layout
from jq.pallas_kernels.compat import (
    FRAGMENT,
    ROWS,
    WORDS,
    arith,
    fragmented_array,
    ir,
    llvm,
    mgpu,
    plgpu,
    vector,
)
from jq.pallas_kernels.weight import SYMMETRIC_ZERO, TRICKS

MASKS = (0x000F000F, 0x00F000F0)  # of the low and the high nibble of each byte
NEGATIVE_ZEROS = 0x80008000  # a pair
_MANTISSA_BITS = {"bfloat16": 7, "float16": 10}
_EXPONENT_BIAS = {"bfloat16": 127, "float16": 15}


@dataclasses.dataclass(frozen=True)
class Format:
    """What the code generated for a slice of 64 inputs depends on.

    dtype: of the operand.
    group_size: inputs per scale; None: one scale per column.
    symmetric: whether the zero is 8 everywhere.
    """

    dtype: str
    group_size: int | None
    symmetric: bool

    @property
    def name(self) -> str:
        group = self.group_size or "channel"
        return f"{self.dtype}_g{group}" + "_zero" * (not self.symmetric)

    @property
    def groups(self) -> int:
        """Scales of a column within a slice."""
        return 2 if self.group_size == 32 else 1


def _power_of_two(exponent: int, dtype: str) -> int:
    """Bits of two packed copies of 2^exponent, a normal number of the dtype."""
    half = (exponent + _EXPONENT_BIAS[dtype]) << _MANTISSA_BITS[dtype]
    return half << 16 | half


@dataclasses.dataclass(frozen=True)
class Constants:
    """Bits of the packed pairs that the generated code multiplies by.

    sixteenth: 2^-4, for the scales of high nibbles.
    minus_eight: the number whose bits are the sign and the code 8.
    spread: P of `weight`'s formulas for low nibbles, and P / 16 for high ones.
    """

    sixteenth: int
    minus_eight: int
    spread: tuple[int, int]


def constants(dtype: str) -> Constants:
    power = TRICKS[dtype].zero[0]
    return Constants(
        sixteenth=_power_of_two(-4, dtype),
        minus_eight=0x80008000 | SYMMETRIC_ZERO * 0x10001,
        spread=(_power_of_two(power, dtype), _power_of_two(power - 4, dtype)),
    )


def source(register: tuple[int, ...], mma: bool = False) -> tuple[int, int]:
    """(word, nibble 0 to 3) of the pair of codes that belongs into a register of FRAGMENT.

    mma: of the A operand of `mma.m16n8k16`, which is numbered in another order.
    """
    if mma:
        return register[1], 2 * register[3] + register[4]
    eighth, row = register[1], register[4]  # of the 64 inputs; half of the warp's 16 columns
    return eighth // 2, 2 * (eighth % 2) + row


def operand(fmt: Format, words, scales, offsets, mma: bool = False):
    """The A operand of a slice, in the registers of a warpgroup.

    Args:
      words: int32 [4, 128] in the layout WORDS.
      scales: one [64] per group of the slice, in the layout ROWS.
      offsets: as many; empty for symmetric formats.
      mma: for `mma.sync` of compute capability 8, which multiplies no bfloat16 pairs without an
        addend: -0 leaves every product as it is, and its sign.
    Returns: fmt.dtype [64 (columns), 64 (inputs)] in the layout FRAGMENT, or that of mma.
    """
    fragments = plgpu.Layout.MMA_LHS(jnp.dtype(fmt.dtype)) if mma else FRAGMENT
    kind = "bf16x2" if fmt.dtype == "bfloat16" else "f16x2"
    bits = constants(fmt.dtype)

    @plgpu.inline_mgpu(
        arg_types=(WORDS, *[ROWS] * (len(scales) + len(offsets))),
        return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.dtype(fmt.dtype), fragments),
    )
    def dequantize(_, words, *rows):
        i32 = ir.IntegerType.get_signless(32)
        half = ir.BF16Type.get() if fmt.dtype == "bfloat16" else ir.F16Type.get()
        pair = ir.VectorType.get((2,), half)

        def asm(text, *args):
            return llvm.inline_asm(i32, list(args), f"{{ {text} }}", "=r" + ",r" * len(args))

        def product(result, left, right):
            if mma:
                load = f"mov.b32 zero, {NEGATIVE_ZEROS}; "
                return load + f"fma.rn.{kind} {result}, {left}, {right}, zero;"
            return f"mul.{kind} {result}, {left}, {right};"

        def times(value, factor):
            text = f".reg .b32 k; .reg .b32 zero; mov.b32 k, {factor}; "
            return asm(text + product("$0", "$1", "k"), value)

        def twice(row):
            """A row's value in both halves of a register, for the thread's two rows."""
            return [
                mgpu.utils.bitcast(mgpu.utils.vector_concat([r, r]), i32)
                for r in row.registers.flat
            ]

        scale = [twice(row) for row in rows[: len(scales)]]
        if fmt.symmetric:
            offset = [[times(s, bits.minus_eight) for s in group] for group in scale]
            scale = [(group, [times(s, bits.sixteenth) for s in group]) for group in scale]
        else:
            offset = [twice(row) for row in rows[len(scales) :]]

        def convert(word, high, group, row):
            """Two codes: bits 0-3 or 4-7 of the word's half-words, for one of the two rows."""
            text = f".reg .b32 t; and.b32 t, $1, {MASKS[high]}; "
            if fmt.symmetric:
                text += f"fma.rn.{kind} $0, t, $2, $3;"
                return asm(text, word, scale[group][high][row], offset[group][row])
            text += f".reg .b32 k; .reg .b32 zero; mov.b32 k, {bits.spread[high]}; "
            text += f"fma.rn.{kind} t, t, k, $2; " + product("$0", "t", "$3")
            return asm(text, word, offset[group][row], scale[group][row])

        [register] = words.registers.flat
        pairs = {}
        for step in range(4):
            word = vector.extract(register, [], [step])
            upper = arith.shrui(word, arith.constant(i32, 8))
            group = step * fmt.groups // 4
            for j in range(4):
                packed = convert(upper if j >= 2 else word, j % 2, group, j % 2)
                pairs[step, j] = mgpu.utils.bitcast(packed, pair)

        fragment = fragments.to_mgpu()
        registers = np.empty(fragment.registers_shape((64, 64)), dtype=object)
        for index in np.ndindex(*registers.shape):
            registers[index] = pairs[source(index, mma)]
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=fragment, _is_signed=None
        )

    return dequantize(words, *scales, *offsets)


def stand_in(fmt: Format, words, scales, offsets):
    """`operand` in plain JAX, for Mosaic's interpreter, which knows no inline assembly."""
    trick = TRICKS[fmt.dtype]
    codes = layout.unpack(words[None, None]).astype(jnp.float32).T  # [64 columns, 64 inputs]

    def spread(rows):
        return jnp.repeat(jnp.stack(rows, 1).astype(jnp.float32), 64 // len(rows), axis=1)

    exponent = trick.unit if fmt.symmetric else trick.unit + trick.zero[0]
    zero = jnp.float32(SYMMETRIC_ZERO)
    if not fmt.symmetric:
        zero = -jnp.ldexp(spread(offsets), -exponent)
    # Not a product: 2^exponent may be below float32's normal numbers.
    return ((codes - zero) * jnp.ldexp(spread(scales), exponent)).astype(fmt.dtype)


def multiply(fmt: Format, accumulator, words, scales, offsets, x, staging):
    """accumulator [64, M] += (operand of a slice) [64, 64] @ x [64, M], asynchronously.

    Interpreted, wgmma takes no registers: there, and only there, the operand passes through
    `staging` (shared memory [64, 64]); compiled kernels have None.  This is the one place where
    the two differ.
    """
    if staging is None:
        plgpu.wgmma(accumulator, operand(fmt, words, scales, offsets), x)
    else:
        staging[...] = stand_in(fmt, words, scales, offsets)
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, staging, x)


def row_of(fmt: Format, inputs: int) -> int:
    """Which of a stage's rows of scales belongs to the input `inputs` of the stage."""
    return 0 if fmt.group_size is None else inputs // fmt.group_size


def rows_per_stage(fmt: Format, inputs: int) -> int:
    """Rows of scales that a stage of so many inputs needs."""
    return 1 if fmt.group_size is None else max(1, inputs // fmt.group_size)


def first_row(fmt: Format, inputs: jax.Array) -> jax.Array | int:
    """The row of scales that a stage starting at input `inputs` begins with."""
    return 0 if fmt.group_size is None else lax.div(inputs, jnp.int32(fmt.group_size))
