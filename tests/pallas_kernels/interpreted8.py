"""Run the 8-bit kernels' schedules in Mosaic's interpreter, see `interpreting`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jq.pallas_kernels import w8a8_decode, w8a8_prefill
from jq.pallas_kernels.config8 import Config8, Decode8Config, Prefill8Config
from jq.pallas_kernels.w8a8 import w8a8
from jq.pallas_kernels.w8a8_prefill import prefill8
from jq.pallas_kernels.weight8 import BLOCK, W8Weight, w8_weight
from tests.pallas_kernels import interpreting


@dataclasses.dataclass(frozen=True)
class Case:
    """A product small enough to interpret.

    tensor: one scale for all of x.  clusters: of the prefill kernel, to share its tiles.
    """

    config: Config8
    m: int
    k: int
    n: int
    dtype: str = "int8"
    block: bool = False
    bias: str | None = None
    out_dtype: str = "bfloat16"
    tensor: bool = False
    clusters: int | None = None

    @property
    def name(self) -> str:
        name = f"{self.config.name}_{self.dtype}" + "_blocks" * self.block + "_tensor" * self.tensor
        size = f"{self.m}x{self.k}x{self.n}"
        return name + (f"_bias_{self.bias}" if self.bias else "") + f"_{self.out_dtype}_{size}"


FP8 = "float8_e4m3fn"
D, P = Decode8Config, Prefill8Config
CASES = (
    # One stage, all of it; a single row.
    Case(D(8, slices=1, stages=2), 1, 128, 128),
    Case(D(8, slices=1, stages=2), 1, 128, 128, FP8),
    # Stages are used again; columns, inputs and rows end within a block.
    Case(D(16, slices=2, stages=2), 19, 704, 192, bias="bfloat16"),
    Case(D(16, slices=2, stages=2), 19, 704, 192, FP8, bias="float32", out_dtype="float16"),
    Case(D(8, slices=3, stages=3, warpgroups=1), 3, 1536, 64, out_dtype="float16", tensor=True),
    Case(D(8, slices=2, stages=2), 5, 640, 256, FP8, block=True),
    Case(D(64, slices=1, stages=3, warpgroups=4), 70, 512, 384, FP8, block=True, bias="bfloat16"),
    # Clusters; the last blocks of one have nothing but zeros to add.
    Case(D(8, slices=1, stages=2, split=2, pdl=True), 5, 512, 128, bias="bfloat16"),
    Case(D(8, slices=1, stages=2, split=8), 2, 640, 64),
    Case(D(32, slices=1, stages=2, split=4), 33, 640, 128, FP8, block=True),
    # Several tiles for each block, and stages that run on across them.
    Case(P(2, 64, stages=2), 136, 384, 192, bias="bfloat16", clusters=1),
    Case(P(2, 64, stages=4, snake=1), 264, 320, 320, FP8, clusters=2, out_dtype="float16"),
    Case(P(1, 128, stages=3), 200, 256, 192, FP8, bias="float16", clusters=3),
    Case(P(2, 256, stages=2), 70, 192, 320, out_dtype="float16"),
    Case(P(1, 192, stages=2), 8, 128, 192, bias="float32"),
    Case(P(2, 128, stages=3), 136, 384, 256, FP8, block=True, bias="bfloat16", clusters=1),
    Case(P(3, 64, stages=2), 197, 256, 128, FP8, block=True),
    # Pairs of blocks; the second of the last one has no columns, or no rows.
    Case(P(2, 64, stages=2, multicast="x"), 136, 256, 320, bias="bfloat16", clusters=1),
    Case(P(2, 64, stages=3, multicast="w"), 264, 256, 128, FP8, clusters=1),
    Case(P(1, 128, stages=2, multicast="w"), 136, 256, 256, FP8, block=True, clusters=1),
)

# Run once more with a mistake in it, to see that mistakes are seen.
BROKEN = {
    "broken decode": Case(D(8, slices=1, stages=2), 8, 512, 64),
    "broken prefill": Case(P(1, 64, stages=2), 64, 512, 64, FP8),
}


def random_codes(rng, shape, dtype) -> jax.Array:
    if dtype == "int8":
        return jnp.asarray(rng.integers(-127, 128, shape).astype(np.int8))
    return jnp.asarray((rng.normal(size=shape) * 50).astype(jnp.dtype(dtype)))


def problem(case: Case) -> tuple[jax.Array, jax.Array, W8Weight, jax.Array | None]:
    """(codes of x, their scales as `w8a8` takes them, weight, bias) of a case."""
    rng = np.random.default_rng(case.k + case.n)

    def scales(*shape):
        return jnp.asarray(rng.uniform(0.5, 1.5, shape) * 1e-3, jnp.float32)

    size = (case.k // BLOCK, case.n // BLOCK) if case.block else (1, case.n)
    w = w8_weight(random_codes(rng, (case.k, case.n), case.dtype), scales(*size))
    x = random_codes(rng, (case.m, case.k), case.dtype)
    x_scale = scales() if case.tensor else scales(case.m, case.k // BLOCK if w.block else 1)
    bias = None if case.bias is None else jnp.asarray(rng.normal(size=case.n), case.bias)
    return x, x_scale, w, bias


def run(case: Case) -> jax.Array:
    x, x_scale, w, bias = problem(case)
    if case.clusters is None:
        options = {"bias": bias, "out_dtype": case.out_dtype, "config": case.config}
        return w8a8(x, x_scale, w, **options, interpret=True)
    x_scale = x_scale.T.reshape(-1)
    options = {"interpret": True, "clusters": case.clusters}
    return prefill8(x, x_scale, w, bias, case.out_dtype, case.config, **options)


def expected(case: Case) -> np.ndarray:
    """In float64, from the codes and scales."""
    x, x_scale, w, bias = problem(case)
    scale, w_scale = np.asarray(x_scale, np.float64), np.asarray(w.scale, np.float64)
    if scale.ndim:
        scale = scale.repeat(case.k // scale.shape[1], axis=1)
    if case.block:
        w_scale = w_scale.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
    else:
        w_scale = w_scale[:, None]
    y = (np.asarray(x, np.float64) * scale) @ (np.asarray(w.codes, np.float64) * w_scale).T
    return y if bias is None else y + np.asarray(bias, np.float64)


def result(case: Case) -> dict:
    return interpreting.compared(case.name, run(case), expected(case))


def main() -> None:
    interpreting.show(CASES, result, sys.argv[1:])
    w8a8_decode.plgpu = w8a8_prefill.plgpu = interpreting.WithoutFences()
    for name, case in BROKEN.items():
        # The interpreter describes races on the standard output.
        with contextlib.redirect_stdout(sys.stderr):
            broken = result(case)
        print(json.dumps(broken | {"name": name}), flush=True)


if __name__ == "__main__":
    main()
