"""Random problems, the shapes that matter, and the float64 answer."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.pallas_kernels.weight import W4Weight, w4_weight

# [K, N] of Llama-3's linears (q, k, v together; gate and up together): 8B, then 70B.
SHAPES = (
    (4096, 6144),
    (4096, 4096),
    (4096, 14336),
    (4096, 28672),
    (14336, 4096),
    (8192, 10240),
    (8192, 8192),
    (8192, 28672),
    (28672, 8192),
)
ROWS = (1, 8, 16, 32, 64, 128, 512, 4096)
SYMMETRIC_ZERO = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """x [M, K] times int4 [K, N]; group: inputs per scale, -1 for one scale per column."""

    m: int
    k: int
    n: int
    group: int = 128
    symmetric: bool = True
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        """Of an item."""
        size = "channel" if self.group == -1 else f"g{self.group}"
        zero = "" if self.symmetric else " zero"
        return f"{self.k}x{self.n} m{self.m} {self.dtype} {size}{zero}"

    @property
    def groups(self) -> int:
        return 1 if self.group == -1 else self.k // self.group

    @property
    def format(self) -> dict[str, Any]:
        """As the tuning table spells it."""
        size = None if self.group in (-1, self.k) else self.group
        return {"dtype": self.dtype, "group_size": size, "symmetric": self.symmetric}

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    def moved_bytes(self) -> int:
        """What any implementation has to move: codes, scales, zero points, x and y once."""
        scales = self.groups * self.n * (2 if self.symmetric else 2.5)
        return int(self.k * self.n / 2 + scales + 2 * self.m * (self.k + self.n))


def of_item(item: Mapping[str, Any]) -> Problem:
    """The problem in an item of a section."""
    return Problem(**item["problem"])


def to_item(problem: Problem, prefix: str = "", **more: Any) -> dict[str, Any]:
    """An item of a section."""
    return {"key": prefix + problem.key, "problem": dataclasses.asdict(problem), **more}


def seed(text: str) -> int:
    """A seed that depends on a key alone."""
    return zlib.crc32(text.encode())


# On the host, to compare with


@dataclasses.dataclass(frozen=True)
class HostProblem:
    """Arrays of NumPy: x [M, K] float64 (values of the dtype), codes uint8 [K, N], scale float32
    [G, N] (values of the dtype), zero uint8 [G, N] or None, and the weight float64 [K, N]."""

    x: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    weight: np.ndarray


def on_host(problem: Problem) -> HostProblem:
    """Random normal x; codes, scales and zero points uniform, results of about unit size."""
    rng = np.random.default_rng(seed(problem.key))
    p = problem
    x = rounded(rng.standard_normal((p.m, p.k), np.float32), p.dtype)
    codes = rng.integers(0, 16, (p.k, p.n), np.uint8)
    scale = rng.uniform(0.5, 2.0, (p.groups, p.n)) / (5 * np.sqrt(p.k))
    scale = rounded(scale, p.dtype)
    zero = None if p.symmetric else rng.integers(0, 16, (p.groups, p.n), np.uint8)
    size = p.k // p.groups
    offset = np.full_like(scale, SYMMETRIC_ZERO) if zero is None else zero.astype(np.float64)
    weight = (codes.reshape(p.groups, size, p.n) - offset[:, None]) * scale[:, None]
    return HostProblem(x, codes, scale.astype(np.float32), zero, weight.reshape(p.k, p.n))


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64, of values that a narrower float holds."""
    return np.asarray(values).astype(jnp.dtype(dtype)).astype(np.float64)


# On the device, to be timed


def device_weight(problem: Problem, number: int) -> tuple[W4Weight, jax.Array]:
    """(a random prepared weight, random x [M, K]); every number gives other ones."""
    return _make(jax.random.key(seed(problem.key) + number), problem)


@functools.partial(jax.jit, static_argnums=1)
def _make(key: jax.Array, p: Problem) -> tuple[W4Weight, jax.Array]:
    codes, scale, zero, x = random_parts(key, p)
    return w4_weight(codes, scale, zero, dtype=p.dtype), x  # pyright: ignore[reportArgumentType]


def random_parts(key: jax.Array, p: Problem) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """(codes, scale float32, zero or None, x) on the device, as `on_host` makes them."""
    keys = jax.random.split(key, 4)
    codes = jax.random.bits(keys[0], (p.k, p.n), jnp.uint8) & jnp.uint8(15)
    scale = jax.random.uniform(keys[1], (p.groups, p.n), minval=0.5, maxval=2.0)
    scale = (scale / (5 * p.k**0.5)).astype(p.dtype).astype(jnp.float32)
    zero = None
    if not p.symmetric:
        zero = jax.random.bits(keys[2], (p.groups, p.n), jnp.uint8) & jnp.uint8(15)
    return codes, scale, zero, jax.random.normal(keys[3], (p.m, p.k), p.dtype)
