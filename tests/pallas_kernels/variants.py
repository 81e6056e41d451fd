"""Which kernels are assembled without a GPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jq.pallas_kernels import tuning
from jq.pallas_kernels.config import Config, DecodeConfig, PrefillConfig
from jq.pallas_kernels.weight import w4_weight

CAPABILITY = (9, 0)
_SIZE = (4096, 4096, 4096)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel of one Config for one format of weights, compiled for x [m, k] @ w [k, n]."""

    config: Config
    group_size: int | None = 128
    zero: bool = False
    dtype: str = "bfloat16"
    m: int = _SIZE[0]
    k: int = _SIZE[1]
    n: int = _SIZE[2]

    opcode = "HGMMA"

    @property
    def name(self) -> str:
        group = self.group_size or "channel"
        name = f"{self.config.name}_{self.dtype}_g{group}" + "_zero" * self.zero
        size = (self.m, self.k, self.n)
        return name if size == _SIZE else name + "_{}x{}x{}".format(*size)

    def lowering(self):
        """(function, shapes of its arguments) to compile."""
        groups = 1 if self.group_size is None else self.k // self.group_size
        shape = jax.ShapeDtypeStruct
        scale = shape((groups, self.n), jnp.float32)
        zero = shape((groups, self.n), jnp.uint8) if self.zero else None
        make = functools.partial(w4_weight, dtype=self.dtype)
        weight = jax.eval_shape(make, shape((self.k, self.n), jnp.uint8), scale, zero)
        x = shape((self.m, self.k), jnp.dtype(self.dtype))
        return functools.partial(run, config=self.config), (x, weight)


def run(x, w, *, config, interpret=False):
    if isinstance(config, DecodeConfig):
        from jq.pallas_kernels.w4a16_decode import decode

        return decode(x, w, config, interpret)
    from jq.pallas_kernels.w4a16_prefill import prefill

    return prefill(x, w, config, interpret)


FORMATS = tuple(
    (group_size, zero, dtype)
    for dtype in ("bfloat16", "float16")
    for group_size in (32, 64, 128, None)
    for zero in (False, True)
)

# Every Config that the heuristic may answer or the table holds at one format, and every format at
# one Config of each kernel's loop (prefill: the costliest).
ALL = tuple(
    dict.fromkeys(
        (
            *(Variant(config) for config in tuning.CANDIDATES),
            *(Variant(config) for config in tuning.TABLE.values()),
            *(Variant(DecodeConfig(), *fmt) for fmt in FORMATS),
            Variant(DecodeConfig(pdl=True, split=2)),
            Variant(PrefillConfig(), 32, True),
            Variant(PrefillConfig(), None, True, "float16"),
            Variant(PrefillConfig(multicast=True), 64, True, "float16"),
            # Smaller than a block in every direction, and ending within one.
            Variant(DecodeConfig(8), None, True, m=1, k=1088, n=64),
            Variant(DecodeConfig(16, split=2), 32, True, m=5, k=1344, n=192),
            Variant(PrefillConfig(64, stages=8), 64, m=72, k=448, n=192),
        )
    )
)
