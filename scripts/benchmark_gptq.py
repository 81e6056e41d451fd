"""GPTQ on one matrix in one compiled call, against the same algorithm in NumPy and BLAS, same run.

    python scripts/benchmark_gptq.py --k 1024 --n 4096 --rows 8192

Both get the calibration rows and the weight, and return codes, scales and zero points: the Gram
matrix, the factorisation and the solve are all inside the timing.  Times are medians; compilation
is reported apart. The errors of both are given, relative to the output on the calibration rows,
with rounding to nearest.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jq.methods.gptq import GPTQ, gptq_quantize
from jq.methods.rtn import rtn_quantize
from jq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        k: inputs of the weight.
        n: its outputs.
        rows: calibration rows.
        bits: of the codes; asymmetric, in groups of `group_size`.
        group_size: inputs per scale.
        repeats: timed calls; the median is given.
        seed: of the random data.
    """

    k: int = 1024
    n: int = 4096
    rows: int = 8192
    bits: int = 4
    group_size: int = 128
    repeats: int = 5
    seed: int = 0


def problem(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [rows, K] with correlated channels of uneven size, and a weight [K, N]; float32."""
    rng = np.random.default_rng(options.seed)
    mixing = np.eye(options.k) + rng.normal(size=(options.k, options.k)) / options.k**0.5
    x = rng.normal(size=(options.rows, options.k)) @ mixing * np.exp(rng.normal(size=options.k))
    w = rng.normal(size=(options.k, options.n))
    return x.astype(np.float32), w.astype(np.float32)


def numpy_gptq(
    x: np.ndarray, w: np.ndarray, spec: QuantSpec, config: GPTQ
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The left-looking form in NumPy: (codes, scales, zero points)."""
    k, n = w.shape
    gram = x.T @ x
    gram[np.diag_indices(k)] += config.damp_percent * np.mean(np.diag(gram))
    root = np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    unit = root / np.diag(root)
    size, top = spec.group_size, 2**spec.bits - 1
    errors = np.zeros((k, n), np.float32)
    codes = np.zeros((k, n), np.uint8)
    scales, zeros = [], []
    for start in range(0, k, size):
        group = slice(start, start + size)
        rows, triangle = w[group], unit[group, group]
        pull = unit[:start, group].T @ errors[:start]
        now = rows + np.linalg.solve(triangle.T, pull).astype(np.float32)
        low, high = np.minimum(now.min(axis=0), 0), np.maximum(now.max(axis=0), 0)
        scale = ((high - low) / top).astype(jnp.bfloat16).astype(np.float32)
        zero = np.clip(np.round(-low / scale), 0, top)
        scales.append(scale)
        zeros.append(zero)
        target = rows + pull
        for i in range(size):
            row = target[i] + triangle[:i, i] @ errors[start : start + i]
            code = np.clip(np.round(row / scale) + zero, 0, top)
            codes[start + i] = code
            errors[start + i] = rows[i] - (code - zero) * scale
    return codes, np.stack(scales), np.stack(zeros)


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """(result, seconds of the first call, median seconds of the others)."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    first = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return result, first, float(np.median(times))


def output_error(x: np.ndarray, w: np.ndarray, q: np.ndarray) -> float:
    """||X (W - Q)|| / ||X W||."""
    return float(np.linalg.norm(x @ (w - q)) / np.linalg.norm(x @ w))


def main() -> int:
    """Time both and print one JSON object."""
    options = tyro.cli(Options, description=__doc__)
    spec = QuantSpec(f"int{options.bits}", options.group_size, symmetric=False)
    config = GPTQ()
    x, w = problem(options)
    device_x, device_w = jnp.asarray(x), jnp.asarray(w)

    @jax.jit
    def one_call(x, w):
        gram = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
        return gptq_quantize(w, gram, spec, config)[0]

    solution, first, median = timed(lambda: one_call(device_x, device_w), options.repeats)
    (codes, scale, zero), _, numpy_median = timed(
        lambda: numpy_gptq(x, w, spec, config), options.repeats
    )
    groups = codes.reshape(scale.shape[0], -1, options.n).astype(np.float32)
    numpy_weight = ((groups - zero[:, None]) * scale[:, None]).reshape(w.shape)
    nearest = np.asarray(rtn_quantize(device_w, spec).dequantize(spec))
    result = {
        **dataclasses.asdict(options),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "compile_seconds": first - median,
        "jit_seconds": median,
        "numpy_seconds": numpy_median,
        "speedup": numpy_median / median,
        "jit_error": output_error(x, w, np.asarray(solution.dequantize(spec))),
        "numpy_error": output_error(x, w, numpy_weight),
        "rtn_error": output_error(x, w, nearest),
        "differing_codes": int(np.sum(np.asarray(solution.codes) != codes)),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
