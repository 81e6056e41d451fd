"""Run the kernels' schedules in Mosaic's interpreter, see `interpreting`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jq.pallas_kernels import w4a16_decode
from jq.pallas_kernels.config import Config, DecodeConfig, PrefillConfig
from jq.pallas_kernels.w4a16_decode import decode
from jq.pallas_kernels.w4a16_prefill import prefill
from jq.pallas_kernels.weight import W4Weight, dequantize, w4_weight
from tests.pallas_kernels import interpreting


@dataclasses.dataclass(frozen=True)
class Case:
    """A product small enough to interpret.  clusters: of the prefill kernel, to share its tiles."""

    config: Config
    m: int
    k: int
    n: int
    group_size: int | None = 64
    zero: bool = False
    dtype: str = "bfloat16"
    clusters: int | None = None

    @property
    def name(self) -> str:
        group = self.group_size or "channel"
        size = f"{self.m}x{self.k}x{self.n}"
        return f"{self.config.name}_{self.dtype}_g{group}" + "_zero" * self.zero + f"_{size}"

    def run(self, x, w) -> jax.Array:
        if isinstance(self.config, DecodeConfig):
            return decode(x, w, self.config, interpret=True)
        return prefill(x, w, self.config, interpret=True, clusters=self.clusters)


CASES = (
    # One stage, all of it; rows that are no multiple of 8.
    Case(DecodeConfig(8, slices=2, stages=2), 1, 128, 128, None),
    # Stages are used again; columns, inputs and rows end within a block.
    Case(DecodeConfig(16, slices=2, stages=2), 19, 448, 192, 64, True),
    Case(DecodeConfig(8, slices=4, stages=3, warpgroups=1), 8, 1024, 64, 128, False, "float16"),
    Case(DecodeConfig(8, slices=3, stages=2, tiles=2), 3, 576, 128, 32, True, "float16"),
    # Clusters; the last blocks of one have nothing but zeros to add.
    Case(DecodeConfig(8, slices=2, stages=2, split=2, pdl=True), 5, 512, 128, 32),
    Case(DecodeConfig(8, slices=2, stages=2, split=8), 2, 640, 64, 128, True),
    Case(DecodeConfig(32, slices=2, stages=2, tiles=2, split=4), 33, 512, 128, 64),
    # Several tiles for each block, and stages that run on across them.
    Case(PrefillConfig(64, stages=2), 70, 192, 192, 64, True, clusters=1),
    Case(PrefillConfig(64, stages=4, snake=1), 130, 256, 320, 128, False, clusters=2),
    Case(PrefillConfig(64, stages=4), 200, 64, 64, None, True, "float16", clusters=3),
    Case(PrefillConfig(128, stages=6), 30, 128, 128, 32, True, "float16"),
    # Pairs of blocks; the second of the last one has no columns.
    Case(PrefillConfig(64, stages=2, multicast=True), 70, 128, 320, 32, False, clusters=1),
)


def weight(k: int, n: int, group_size: int | None, zero: bool, dtype: str) -> W4Weight:
    rng = np.random.default_rng(k + n)
    groups = 1 if group_size is None else k // group_size
    codes = jnp.asarray(rng.integers(0, 16, (k, n)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.005, 0.02, (groups, n)), jnp.float32)
    zeros = jnp.asarray(rng.integers(0, 16, (groups, n)), jnp.uint8) if zero else None
    return jax.jit(functools.partial(w4_weight, dtype=dtype))(codes, scale, zeros)


# Run once more with a mistake in it, to see that mistakes are seen.
BROKEN = Case(DecodeConfig(8, slices=2, stages=2), 8, 512, 64)


def result(case: Case) -> dict:
    w = weight(case.k, case.n, case.group_size, case.zero, case.dtype)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(case.m, case.k)), case.dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(jax.jit(dequantize)(w), np.float64)
    return interpreting.compared(case.name, case.run(x, w), exact)


def main() -> None:
    interpreting.show(CASES, result, sys.argv[1:])
    w4a16_decode.plgpu = interpreting.WithoutFences()
    # The interpreter describes races on the standard output.
    with contextlib.redirect_stdout(sys.stderr):
        broken = result(BROKEN)
    print(json.dumps(broken | {"name": "broken"}), flush=True)


if __name__ == "__main__":
    main()
