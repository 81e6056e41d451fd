"""Random 8-bit problems and the float64 answer; shapes and rows are those of `problems`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.pallas_kernels.weight8 import BLOCK, W8Weight, w8_weight
from scripts.gpu.problems import rounded, seed

FP8 = "float8_e4m3fn"
# Standard deviation of the codes: uniform in -127..127, normal with few beyond 448.
_SPREAD = {"int8": 73.3, FP8: 100.0}


@dataclasses.dataclass(frozen=True)
class Problem8:
    """8-bit x [M, K] times [K, N]; block: scales per 128 x 128 block (float8), else per column."""

    m: int
    k: int
    n: int
    dtype: str = "int8"
    block: bool = False
    bias: bool = False
    out: str = "bfloat16"

    @property
    def key(self) -> str:
        """Of an item."""
        more = " blocks" * self.block + " bias" * self.bias
        return f"{self.k}x{self.n} m{self.m} {self.dtype}{more} {self.out}"

    @property
    def format(self) -> dict[str, Any]:
        """As the tuning table spells it."""
        return {"dtype": self.dtype, "block": BLOCK if self.block else None}

    @property
    def scales(self) -> tuple[int, int]:
        """Of the weight."""
        return (self.k // BLOCK, self.n // BLOCK) if self.block else (1, self.n)

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    def moved_bytes(self) -> int:
        """What any implementation has to move: codes, scales and y once."""
        scales = self.scales[0] * self.scales[1] + self.m * self.scales[0]
        codes = (self.m + self.n) * self.k
        return codes + 4 * scales + 2 * self.m * self.n + 2 * self.n * self.bias


def of_item8(item: Mapping[str, Any]) -> Problem8:
    """The problem in an item of a section."""
    return Problem8(**item["problem8"])


def to_item8(problem: Problem8, prefix: str = "", **more: Any) -> dict[str, Any]:
    """An item of a section."""
    return {"key": prefix + problem.key, "problem8": dataclasses.asdict(problem), **more}


# On the host, to compare with


@dataclasses.dataclass(frozen=True)
class HostProblem8:
    """Arrays of NumPy: codes of x [M, K] and of the weight [K, N] in the dtype, float32 scales of
    x [M, 1 or K/128] and of the weight, bias [N] float32 or None, and y float64 [M, N]."""

    x: np.ndarray
    x_scale: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None
    expected: np.ndarray


def on_host8(problem: Problem8) -> HostProblem8:
    """Random codes and scales, results of about unit size."""
    p, rng = problem, np.random.default_rng(seed(problem.key))
    x, codes = _random_codes(rng, (p.m, p.k), p.dtype), _random_codes(rng, (p.k, p.n), p.dtype)
    size = 1 / (_SPREAD[p.dtype] * p.k**0.25)
    x_scale = (rng.uniform(0.5, 1.5, (p.m, p.scales[0])) * size).astype(np.float32)
    scale = (rng.uniform(0.5, 1.5, p.scales) * size).astype(np.float32)
    bias = rounded(rng.standard_normal(p.n), p.out).astype(np.float32) if p.bias else None
    left = x.astype(np.float64) * x_scale.repeat(p.k // x_scale.shape[1], axis=1)
    wide = scale.repeat(p.k // scale.shape[0], axis=0).repeat(p.n // scale.shape[1], axis=1)
    expected = left @ (codes.astype(np.float64) * wide)
    if bias is not None:
        expected += bias
    return HostProblem8(x, x_scale, codes, scale, bias, expected)


def _random_codes(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    if dtype == "int8":
        return rng.integers(-127, 128, shape, np.int8)
    values = rng.standard_normal(shape, np.float32) * np.float32(_SPREAD[dtype])
    return np.clip(values, -448, 448).astype(jnp.dtype(dtype))


# On the device, to be timed


def random_codes(key: jax.Array, shape: tuple[int, int], dtype: str) -> jax.Array:
    """As `on_host8` makes them."""
    if dtype == "int8":
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    values = jax.random.normal(key, shape) * _SPREAD[dtype]
    return jnp.clip(values, -448, 448).astype(dtype)


def device_problem8(problem: Problem8, number: int) -> tuple[jax.Array, jax.Array, W8Weight]:
    """(codes of x, their scales, a prepared weight); every number gives other ones."""
    return _make8(jax.random.key(seed(problem.key) + number), problem)


@functools.partial(jax.jit, static_argnums=1)
def _make8(key: jax.Array, p: Problem8) -> tuple[jax.Array, jax.Array, W8Weight]:
    keys = jax.random.split(key, 4)
    size = 1 / (_SPREAD[p.dtype] * p.k**0.25)

    def scales(key, shape):
        return jax.random.uniform(key, shape, minval=0.5 * size, maxval=1.5 * size)

    w = w8_weight(random_codes(keys[0], (p.k, p.n), p.dtype), scales(keys[1], p.scales))
    x_scale = scales(keys[3], (p.m, p.scales[0]))
    return random_codes(keys[2], (p.m, p.k), p.dtype), x_scale, w
