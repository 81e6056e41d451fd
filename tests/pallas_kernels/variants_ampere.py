"""Which kernels for Ampere and Ada are assembled without a GPU: one list per compute capability.

The suites `variants_sm80`, `variants_sm86` and `variants_sm89` are these lists.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jq.pallas_kernels.ampere import w4a16, w8a8
from jq.pallas_kernels.ampere.config import W4Config, W8Config
from jq.pallas_kernels.weight import w4_weight
from jq.pallas_kernels.weight8 import w8_weight

FP8 = "float8_e4m3fn"
_M, _K, _N = 256, 4096, 4096
_SHAPE = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Int4:
    """The int4 kernel of one Config for one format of weights."""

    config: W4Config
    group_size: int | None = 128
    zero: bool = False
    dtype: str = "bfloat16"

    opcode = "HMMA"

    @property
    def name(self) -> str:
        group = self.group_size or "channel"
        return f"w4_{self.config.name}_{self.dtype}_g{group}" + "_zero" * self.zero

    def lowering(self):
        """(function, shapes of its arguments) to compile: the kernel alone, as XLA's own code
        wants a fuller description of the device."""
        groups = 1 if self.group_size is None else _K // self.group_size
        zero = _SHAPE((groups, _N), jnp.uint8) if self.zero else None
        make = functools.partial(w4_weight, dtype=self.dtype)
        scale = _SHAPE((groups, _N), jnp.float32)
        weight = jax.eval_shape(make, _SHAPE((_K, _N), jnp.uint8), scale, zero)
        x = _SHAPE((_M, _K), jnp.dtype(self.dtype))
        return functools.partial(w4a16.launch, config=self.config), (x, weight)


@dataclasses.dataclass(frozen=True)
class Eight:
    """The 8-bit kernel of one Config for one format."""

    config: W8Config
    dtype: str = "int8"
    block: bool = False
    bias: bool = False
    out_dtype: str = "bfloat16"

    @property
    def opcode(self) -> str:
        return "IMMA" if self.dtype == "int8" else "QMMA"

    @property
    def name(self) -> str:
        name = f"w8_{self.config.name}_{self.dtype}" + "_blocks" * self.block
        return name + "_bias" * self.bias + f"_{self.out_dtype}"

    def lowering(self):
        """(function, shapes of its arguments) to compile."""
        scales = (_K // 128, _N // 128) if self.block else (1, _N)
        codes = _SHAPE((_K, _N), jnp.dtype(self.dtype))
        weight = jax.eval_shape(w8_weight, codes, _SHAPE(scales, jnp.float32))
        x, x_scale = _SHAPE((_M, _K), codes.dtype), _SHAPE((_M,), jnp.float32)
        if self.block:
            x_scale = _SHAPE((_K // 128, _M), jnp.float32)
        bias = _SHAPE((_N,), jnp.float32) if self.bias else None
        product = functools.partial(w8a8.launch, out=jnp.dtype(self.out_dtype), config=self.config)
        return product, (x, x_scale, weight, bias)


# Every block and stage that the estimate may answer, the formats spread over them: the number of
# stages, and of parts beyond two, changes constants only.
SM80 = (
    Int4(W4Config(16, 2, 2, 4)),
    Int4(W4Config(16, 1, 2, 4, split=4), 64),
    Int4(W4Config(16, 1, 1, 4), None, True, "float16"),
    Int4(W4Config(32, 2, 2, 3, split=2), 32, True),
    Int4(W4Config(32, 1, 1, 4), 128, True),
    Int4(W4Config(64, 2, 1, 4), 32, True),
    Int4(W4Config(64, 2, 1, 4), 128, False, "float16"),
    Int4(W4Config(64, 1, 1, 4), None),
    Eight(W8Config(16, 64, 2, 4)),
    Eight(W8Config(16, 64, 1, 4, split=4)),
    Eight(W8Config(16, 128, 2, 3), bias=True, out_dtype="float16"),
    Eight(W8Config(32, 64, 2, 3), bias=True),
    Eight(W8Config(32, 128, 2, 3, split=2), bias=True),
    Eight(W8Config(64, 64, 1, 4)),
    Eight(W8Config(64, 128, 1, 4), bias=True),
    Eight(W8Config(64, 128, 2, 3)),
    Eight(W8Config(128, 128, 1, 4), bias=True),
)
SM86 = (Int4(W4Config(64, 2, 1, 3), 32, True), Eight(W8Config(128, 128, 1, 4), bias=True))
SM89 = (
    Int4(W4Config(32, 2, 2, 3, split=2), 32, True),
    Eight(W8Config(128, 128, 1, 4), bias=True),
    Eight(W8Config(16, 64, 2, 4), FP8),
    Eight(W8Config(16, 64, 1, 4), FP8),
    Eight(W8Config(16, 128, 2, 3, split=2), FP8, block=True),
    Eight(W8Config(32, 64, 2, 3), FP8, bias=True, out_dtype="float16"),
    Eight(W8Config(32, 128, 2, 3), FP8),
    Eight(W8Config(64, 64, 1, 4), FP8, bias=True),
    Eight(W8Config(64, 128, 1, 4), FP8),
    Eight(W8Config(64, 128, 2, 3), FP8, block=True, bias=True),
)
