"""Which W8A8 kernels for Hopper are assembled without a GPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jq.pallas_kernels import tuning8
from jq.pallas_kernels.config8 import Config8, Decode8Config, Prefill8Config
from jq.pallas_kernels.w8a8_decode import decode8
from jq.pallas_kernels.w8a8_prefill import prefill8
from jq.pallas_kernels.weight8 import w8_weight

CAPABILITY = (9, 0)
FP8 = "float8_e4m3fn"
# int32 sums become float32 after the loop, at whatever price the assembler chooses.
FORBIDDEN = ("LDL", "STL")
# Inputs for loops of many steps, however they are split.
_SIZE = (4096, 28672, 4096)


@dataclasses.dataclass(frozen=True)
class Variant8:
    """A kernel of one Config for one format, compiled for x [m, k] @ w [k, n]."""

    config: Config8
    dtype: str = "int8"
    block: bool = False
    bias: str | None = None
    out_dtype: str = "bfloat16"
    m: int = _SIZE[0]
    k: int = _SIZE[1]
    n: int = _SIZE[2]

    @property
    def opcode(self) -> str:
        return "IGMMA" if self.dtype == "int8" else "QGMMA"

    @property
    def name(self) -> str:
        name = f"{self.config.name}_{self.dtype}" + "_blocks" * self.block
        name += f"_bias_{self.bias}" if self.bias else ""
        name += f"_{self.out_dtype}"
        size = (self.m, self.k, self.n)
        return name if size == _SIZE else name + "_{}x{}x{}".format(*size)

    def lowering(self):
        """(function, shapes of its arguments) to compile."""
        shape, dtype = jax.ShapeDtypeStruct, jnp.dtype(self.dtype)
        scales = (self.k // 128, self.n // 128) if self.block else (1, self.n)
        codes = shape((self.k, self.n), dtype)
        weight = jax.eval_shape(w8_weight, codes, shape(scales, jnp.float32))
        x = shape((self.m, self.k), dtype)
        x_scale = shape((self.m * scales[0],), jnp.float32)
        bias = shape((self.n,), jnp.dtype(self.bias)) if self.bias else None
        product = functools.partial(_product, config=self.config, out_dtype=self.out_dtype)
        return product, (x, x_scale, weight, bias)


def _product(x, x_scale, w, bias, *, config, out_dtype):
    """The kernel alone: XLA's own fusions want a fuller description of the device."""
    if isinstance(config, Decode8Config):
        return decode8(x, x_scale, w, bias, out_dtype, config)
    return prefill8(x, x_scale, w, bias, out_dtype, config)


def _one_split(configs):
    """Of equal blocks those that share their inputs least: the loop is the same in all."""
    found: dict[Config8, Config8] = {}
    for config in configs:
        decode = isinstance(config, Decode8Config)
        found.setdefault(dataclasses.replace(config, split=1) if decode else config, config)
    return list(found.values())


_DEFAULT, _PREFILL = Decode8Config(), Prefill8Config(2, 128, stages=5)
# Every Config that the heuristic may answer, but for the split, or the table holds, and every
# format at one Config of each kernel.
ALL = tuple(
    dict.fromkeys(
        (
            *(Variant8(config) for config in _one_split(tuning8.candidates("int8"))),
            *(Variant8(config, FP8) for config in _one_split(tuning8.candidates(FP8))),
            *(Variant8(config, key.dtype) for key, config in tuning8.TABLE.items() if config),
            *(
                Variant8(config, dtype, block, bias, out_dtype)
                for config, bias, out_dtype in (
                    (_DEFAULT, "bfloat16", "bfloat16"),
                    (_PREFILL, "float32", "float16"),
                )
                for dtype, block in (("int8", False), (FP8, False), (FP8, True))
            ),
            *(Variant8(Decode8Config(16, stages=3, split=split)) for split in (2, 4, 8)),
            # The largest of each kernel, with all that it can hold.
            Variant8(Decode8Config(64, slices=1, stages=4, warpgroups=4), FP8, True, "float32"),
            Variant8(Decode8Config(64, slices=1, stages=4, split=4), FP8, True, "bfloat16"),
            Variant8(Decode8Config(8, slices=4, stages=2, split=8, pdl=True), bias="bfloat16"),
            Variant8(Prefill8Config(2, 256, stages=4, multicast="w"), bias="float32"),
            Variant8(Prefill8Config(3, 128, stages=4, multicast="x"), FP8, True, "float32"),
            # Smaller than a block in every direction, and ending within one.
            Variant8(Decode8Config(8), m=1, k=1088, n=64),
            Variant8(Decode8Config(16, split=2), FP8, True, m=16, k=1408, n=384),
            Variant8(Prefill8Config(2, 64, stages=6), FP8, bias="float16", m=72, k=448, n=192),
        )
    )
)
