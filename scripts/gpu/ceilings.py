"""What the device can do at best: its copy bandwidth and its bfloat16 matrix rate."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from scripts.gpu import timing

_BYTES = 2 << 30
_SIZE = 8192


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bandwidths, then the rate on random numbers (zeros would run faster)."""
    return [{"key": "copy"}, {"key": "read"}, {"key": "matmul"}, {"key": "launch"}]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """One of them."""
    timer = facts.get("timer", "wall")
    return {"copy": copy, "read": read, "matmul": matmul, "launch": launch}[item["key"]](timer)


def copy(timer: str, size: int = _BYTES) -> dict[str, Any]:
    """GB/s of a kernel that reads and writes; bytes read and written are counted."""
    x = _random_words(size)
    program = jax.jit(lambda x: x ^ jnp.uint32(1)).lower(x).compile()
    told = timing.measure(program, [x], 1, timer)
    return {**told, "gbs": 2 * size / told["us"] / 1e3}


def read(timer: str, size: int = _BYTES) -> dict[str, Any]:
    """GB/s of a kernel that reads, and writes next to nothing."""
    x = _random_words(size).reshape(-1, 4096)
    program = jax.jit(lambda x: jnp.max(x, axis=1)).lower(x).compile()
    told = timing.measure(program, [x], 1, timer)
    return {**told, "gbs": size / told["us"] / 1e3}


def matmul(timer: str, size: int = _SIZE) -> dict[str, Any]:
    """TFLOP/s of bfloat16 [size, size] @ [size, size], random numbers, by XLA."""
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    program = jax.jit(lambda x, w: dot(x, w).astype(jnp.bfloat16)).lower(x, w).compile()
    told = timing.measure(program, [x, w], 1, timer)
    return {**told, "tflops": 2 * size**3 / told["us"] / 1e6}


def launch(timer: str) -> dict[str, Any]:
    """Microseconds of a kernel with nothing to do, in a row of 64 that wait for each other."""
    x = jnp.arange(8, dtype=jnp.float32)

    def chain(x):
        for _ in range(64):
            x = jax.lax.optimization_barrier(x + 1)
        return x

    return timing.measure(jax.jit(chain).lower(x).compile(), [x], 64, timer)


def _random_words(size: int) -> jax.Array:
    return jax.block_until_ready(jax.random.bits(jax.random.key(1), (size // 4,), jnp.uint32))
