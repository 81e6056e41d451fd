"""Programs that multiply with several weights in turn, together larger than the L2 cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jq.matmul import qmatmul
from jq.pallas_kernels.w4a16 import w4a16
from jq.qtensor import from_codes
from jq.spec import QuantSpec
from scripts.gpu import family
from scripts.gpu.problems import Problem, device_weight, random_parts, seed

# More than three times the 50 or 60 MB of the caches; a product that moves much more needs no
# second weight, only that its own data be cold.
_COLD_BYTES = 192 << 20
_MOST = 32
METHODS = ("w4", "bf16", "dequantize")


def rotations(p: Problem, method: str) -> int:
    """How many weights are multiplied with in turn."""
    return cold_rotations(int(p.k * p.n * (2 if method == "bf16" else 0.5)), p.m)


def cold_rotations(weight_bytes: int, m: int) -> int:
    """How many weights of a size do not fit the cache together."""
    count = -(-_COLD_BYTES // weight_bytes)
    # Many rows take long by themselves, and their results take memory.
    return max(2, min(count, _MOST if m <= 128 else 4))


def arguments(p: Problem, method: str) -> list[tuple[jax.Array, Any]]:
    """(x, weight) pairs, all different, so that nothing is shared between products."""
    make = {"w4": _w4, "bf16": _bf16, "dequantize": _portable}[method]
    pairs = [make(p, number) for number in range(rotations(p, method))]
    return jax.block_until_ready(pairs)


def _w4(p: Problem, number: int) -> tuple[jax.Array, Any]:
    weight, x = device_weight(p, number)
    return x, weight


@functools.partial(jax.jit, static_argnums=(0,))
def _random_dense(p: Problem, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (p.m, p.k), p.dtype)
    return x, (jax.random.normal(keys[1], (p.k, p.n)) / p.k**0.5).astype(p.dtype)


def _bf16(p: Problem, number: int) -> tuple[jax.Array, Any]:
    return _random_dense(p, jax.random.key(seed(p.key) + number))


@functools.partial(jax.jit, static_argnums=(0,))
def _random_portable(p: Problem, key: jax.Array) -> tuple[jax.Array, Any]:
    codes, scale, zero, x = random_parts(key, p)
    return x, from_codes(codes, scale, zero, QuantSpec("int4", p.group, p.symmetric))


def _portable(p: Problem, number: int) -> tuple[jax.Array, Any]:
    return _random_portable(p, jax.random.key(seed(p.key) + number))


def product(method: str, config: Any = None) -> Callable[[jax.Array, Any], jax.Array]:
    """(x, weight) -> y.  "dequantize": XLA's own way with a QTensor."""
    if method != "w4":
        return qmatmul
    # A function of its own in the program, so that it is lowered once for all weights.
    return jax.jit(functools.partial(w4a16, config=config, compute_capability=family.here()))


def build(p: Problem, method: str, config: Any = None) -> Any:
    """Compile the program that computes every product; called as program(pairs)."""
    one = product(method, config)

    def every(pairs):
        return [one(x, w) for x, w in pairs]

    shapes = jax.eval_shape(lambda: [_shapes(p, method)] * rotations(p, method))
    return jax.jit(every).lower(shapes).compile()


def _shapes(p: Problem, method: str) -> tuple[jax.Array, Any]:
    return {"w4": _w4, "bf16": _bf16, "dequantize": _portable}[method](p, 0)


def spread(y: jax.Array) -> float:
    """Root mean square of a result: about 1 where all is well."""
    return float(jnp.sqrt(jnp.mean(jnp.square(y[:8].astype(jnp.float32)))))
