"""The kernels' results against float64, on random data and in poisoned buffers.

Every result is computed into a buffer of NaN, five times.  What counts: the relative error (norm
over norm), beside that of the dtype's own rounding of weight and result; the worst single element;
elements never written; elements that differ between runs, which a race would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.pallas_kernels.w4a16 import w4a16
from jq.pallas_kernels.weight import w4_weight
from scripts.gpu import candidates, family, library
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.problems import HostProblem, Problem, of_item, on_host, rounded, to_item

GROUPS = (128, 64, 32, -1)
RUNS = 5
# Of the worst element, over the root mean square of the result: one rounding of a large result.
WORST = {"bfloat16": 0.04, "float16": 0.006}
OWN_ROUNDING = 1.25


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The real case first, then every format, numbers of rows, odd sizes, and every config."""
    problems = [Problem(m, 4096, 4096) for m in (16, 1, 64, 128, 512)]
    problems += [
        Problem(m, 2048, 1024, group, symmetric, dtype)
        for m in (16, 300)
        for dtype in ("bfloat16", "float16")
        for symmetric in (True, False)
        for group in GROUPS
    ]
    problems += [Problem(m, 1024, 768, 128, False) for m in (2, 7, 8, 9, 17, 31, 33, 48, 63, 65)]
    problems += [Problem(m, 1024, 768, 128, False) for m in (100, 128, 129, 200, 256, 257, 1000)]
    problems += [Problem(m, k, n, g) for m in (5, 200) for k, n, g in candidates.ODD_SIZES]
    problems += [Problem(16, 14336, 4096, -1), Problem(16, 4096, 28672), Problem(1000, 4096, 4096)]
    listed = {p.key: to_item(p) for p in problems}
    tried = [
        to_item(p, f"{config.name} ", config=config_json(config))
        for p, config in candidates.every_config()
    ]
    uses = [{"key": f"library: {name}", "use": name} for name in library.USES]
    first, rest = list(listed.values())[:5], list(listed.values())[5:]
    return [*first, *uses, *rest, *tried]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compute and compare."""
    if "use" in item:
        return library.run(item["use"])
    problem = of_item(item)
    host = on_host(problem)
    return compare(problem, host, config_of(item.get("config")))


def compare(problem: Problem, host: HostProblem, config: Any, **options: Any) -> dict[str, Any]:
    """Run the kernel and judge its results; `options` go to the kernel."""
    zero = None if host.zero is None else jnp.asarray(host.zero)
    prepare = jax.jit(lambda c, s, z: w4_weight(c, s, z, dtype=problem.dtype))  # pyright: ignore
    weight = prepare(jnp.asarray(host.codes), jnp.asarray(host.scale), zero)
    x = jnp.asarray(host.x, problem.dtype)

    def product(poison, x, weight):
        del poison  # its buffer becomes the result's
        return w4a16(x, weight, config=config, compute_capability=family.here(), **options)

    program = jax.jit(product, donate_argnums=0, keep_unused=True)
    runs = []
    for _ in range(RUNS):
        poison = jnp.full((problem.m, problem.n), jnp.nan, problem.dtype)
        y = program(poison, x, weight)
        runs.append(np.asarray(y).astype(np.float64))
    return judge(runs, host, problem.dtype)


def judge(runs: list[np.ndarray], host: HostProblem, dtype: str) -> dict[str, Any]:
    """Errors of results [M, N], and whether they are what rounding alone explains."""
    expected = host.x @ host.weight
    own = rounded(host.x @ rounded(host.weight, dtype), dtype)
    return compared(runs, expected, own, dtype)


def compared(
    runs: list[np.ndarray], expected: np.ndarray, own: np.ndarray, dtype: str, allowed: float = 0.0
) -> dict[str, Any]:
    """Errors of results [M, N] beside those of `own`, which is as right as the dtype permits.

    allowed: error (norm over norm) that the products themselves may have beside.
    """
    size = np.linalg.norm(expected)
    difference = runs[0] - expected
    error = float(np.linalg.norm(difference) / size)
    own_error = float(np.linalg.norm(own - expected) / size)
    worst = float(np.nanmax(np.abs(difference), initial=0) / (size / expected.size**0.5))
    unwritten = int(np.isnan(runs[0]).sum())
    changed = [(other != runs[0]) & ~np.isnan(runs[0]) for other in runs[1:]]
    varying = int(np.sum(changed))
    good = error <= OWN_ROUNDING * own_error + allowed and worst < WORST[dtype]
    return {
        "ok": bool(good and not unwritten and not varying),
        "error": error,
        "own_rounding": own_error,
        "worst": worst,
        "unwritten": unwritten,
        "varying": varying,
        **_where(difference, expected, good),
    }


def _where(difference: np.ndarray, expected: np.ndarray, good: bool) -> dict[str, Any]:
    """For wrong results: how much of each block of 64 columns and rows is wrong."""
    if good:
        return {}
    limit = 0.1 * np.sqrt(np.mean(expected**2))
    wrong = ~(np.abs(difference) < limit)
    columns = [round(float(c.mean()), 3) for c in np.split(wrong, range(64, wrong.shape[1], 64), 1)]
    rows = [round(float(r.mean()), 3) for r in np.split(wrong, range(8, wrong.shape[0], 8), 0)]
    return {"wrong": float(wrong.mean()), "wrong_columns": columns[:32], "wrong_rows": rows[:32]}
