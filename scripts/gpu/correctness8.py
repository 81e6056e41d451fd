"""The 8-bit kernels' results against float64, and the quantization of activations against XLA's
(see `correctness`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.pallas_kernels.quantize_rows import quantize_rows, quantize_rows_reference
from jq.pallas_kernels.w8a8 import w8a8
from jq.pallas_kernels.weight8 import w8_weight
from scripts.gpu import candidates8, family
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.correctness import RUNS, compared
from scripts.gpu.problems import rounded, seed
from scripts.gpu.problems8 import FP8, HostProblem8, Problem8, of_item8, on_host8, to_item8

FORMATS = (("int8", False), (FP8, False), (FP8, True))
# The tensor cores keep fewer bits of a float8 sum than float32 has, of 128 products at a time:
# an assumption until it has been measured. int8 sums are exact.
FP8_SUMS = 2.0**-10
# (rows, inputs) of activations to quantize.
ROWS = ((1, 4096), (16, 4096), (33, 896), (7, 14336), (4096, 4096))


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The real cases first, then every format, numbers of rows, odd sizes, and every config."""
    problems = [Problem8(m, 4096, 4096, *f) for m in (16, 1, 64, 128, 512) for f in FORMATS]
    first = len(problems)
    problems += [
        Problem8(m, 2048, 1024, *fmt, bias, out)
        for m in (16, 300)
        for fmt in FORMATS
        for bias in (False, True)
        for out in ("bfloat16", "float16")
    ]
    few = (2, 7, 8, 9, 17, 31, 33, 48, 63, 65, 100, 128, 129, 200, 256, 257, 1000)
    problems += [Problem8(m, 1024, 768, *FORMATS[i % 3]) for i, m in enumerate(few)]
    odd = [(k, n, *f) for k, n in candidates8.ODD_SIZES for f in FORMATS[:2]]
    problems += [Problem8(m, *o) for m in (5, 200) for o in odd]
    problems += [
        Problem8(16, 14336, 4096, FP8),
        Problem8(16, 4096, 28672),
        Problem8(1000, 4096, 4096),
    ]
    listed = list({p.key: to_item8(p) for p in problems}.values())
    tried = [
        to_item8(p, f"{config.name} ", config=config_json(config))
        for p, config in candidates8.every_config()
    ]
    return family.possible([*listed[:first], *_quantizations(), *listed[first:], *tried])


def _quantizations() -> list[dict[str, Any]]:
    kinds = (("int8", None, False), (FP8, None, False), (FP8, 128, False), ("int8", None, True))
    return [
        {
            "key": f"rows {m}x{k} {dtype} group {group}" + " norm" * norm,
            "rows": [m, k, dtype, group, norm],
        }
        for m, k in ROWS
        for dtype, group, norm in kinds
    ]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compute and compare."""
    if "rows" in item:
        return quantized(*item["rows"])
    problem = of_item8(item)
    return compare8(problem, on_host8(problem), config_of(item.get("config")))


def compare8(problem: Problem8, host: HostProblem8, config: Any) -> dict[str, Any]:
    """Run the kernel into buffers of NaN and judge its results."""
    weight = jax.jit(w8_weight)(jnp.asarray(host.codes), jnp.asarray(host.scale))
    x, x_scale = jnp.asarray(host.x), jnp.asarray(host.x_scale)
    bias = None if host.bias is None else jnp.asarray(host.bias, problem.out)

    def product(poison, x, x_scale, weight, bias):
        del poison  # its buffer becomes the result's
        options = {"config": config, "compute_capability": family.here()}
        return w8a8(x, x_scale, weight, bias=bias, out_dtype=problem.out, **options)

    program = jax.jit(product, donate_argnums=0, keep_unused=True)
    runs = []
    for _ in range(RUNS):
        poison = jnp.full((problem.m, problem.n), jnp.nan, problem.out)
        runs.append(np.asarray(program(poison, x, x_scale, weight, bias)).astype(np.float64))
    own = rounded(host.expected, problem.out)
    allowed = 0.0 if problem.dtype == "int8" else FP8_SUMS
    return compared(runs, host.expected, own, problem.out, allowed)


def quantized(
    m: int, k: int, dtype: Any, group: int | None, normalised: bool = False
) -> dict[str, Any]:
    """How many codes and scales of random activations are not XLA's; normalised: of an RMSNorm's
    results."""
    x = jax.random.normal(jax.random.key(seed(f"{m} {k}")), (m, k), jnp.bfloat16)
    norm = (jnp.linspace(0.5, 2, k, dtype=jnp.bfloat16), 1e-5) if normalised else None
    codes, scale = jax.jit(lambda x: quantize_rows(x, dtype, group=group, norm=norm))(x)
    exact, exact_scale = jax.jit(
        lambda x: quantize_rows_reference(x, dtype, group=group, norm=norm)
    )(x)
    other = int(jnp.sum(codes.astype(jnp.float32) != exact.astype(jnp.float32)))
    other_scales = int(jnp.sum(scale != exact_scale))
    worst = float(jnp.max(jnp.abs(scale / exact_scale - 1)))
    # The sums of a norm have orders of their own: values may be next to XLA's. Else all are equal,
    # but for what a compiler may do to the last bit of a scale.
    steps, few = (2.0**-7, 50) if normalised else (2.0**-22, 1000)
    ok = worst < steps and other <= max(2, x.size // few)
    return {"ok": ok, "other_codes": other, "other_scales": other_scales, "error": worst}
