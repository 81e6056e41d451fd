"""Which kernels are assembled, and what each may cost."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jq.pallas_kernels.config import Config, DecodeConfig, PrefillConfig
from jq.pallas_kernels.weight import w4_weight


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel of one Config for one format of weights, and the recorded bounds.

    registers: most per thread that it was assembled with.
    slots: most instructions per 64 x 64 tile of the weight, rounded up.
    """

    config: Config
    group_size: int | None = 128
    zero: bool = False
    dtype: str = "bfloat16"
    registers: int = 255
    slots: float = 999
    m: int = 0
    k: int = 4096
    n: int = 4096

    @property
    def name(self) -> str:
        group = self.group_size or "channel"
        return f"{self.config.name}_{self.dtype}_g{group}" + "_zero" * self.zero

    def lowering(self):
        """(function, shapes of its arguments) to compile."""
        groups = 1 if self.group_size is None else self.k // self.group_size
        shape = jax.ShapeDtypeStruct
        scale = shape((groups, self.n), jnp.float32)
        zero = shape((groups, self.n), jnp.uint8) if self.zero else None
        make = functools.partial(w4_weight, dtype=self.dtype)
        weight = jax.eval_shape(make, shape((self.k, self.n), jnp.uint8), scale, zero)
        x = shape((self.m or self.config.block_m, self.k), jnp.dtype(self.dtype))
        return functools.partial(run, config=self.config), (x, weight)


def run(x, w, *, config, interpret=False):
    if isinstance(config, DecodeConfig):
        from jq.pallas_kernels.w4a16_decode import decode

        return decode(x, w, config, interpret)
    from jq.pallas_kernels.w4a16_prefill import prefill

    return prefill(x, w, config, interpret)


ALL = (
    Variant(DecodeConfig()),
    Variant(DecodeConfig(), None),
    Variant(DecodeConfig(), 64, True),
    Variant(DecodeConfig(), 32),
    Variant(DecodeConfig(), 32, True),
    Variant(DecodeConfig(), 128, True, "float16"),
    Variant(DecodeConfig(), 128, False, "float16"),
    Variant(DecodeConfig(split=4)),
    Variant(DecodeConfig(block_m=8, split=8)),
    Variant(DecodeConfig(block_m=64, tiles=2, slices=2)),
    Variant(DecodeConfig(pdl=True, split=2)),
    Variant(PrefillConfig(), m=4096),
    Variant(PrefillConfig(), 32, True, m=4096),
    Variant(PrefillConfig(multicast=True), m=4096),
    Variant(PrefillConfig(block_m=128), m=512),
)
