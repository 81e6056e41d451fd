"""What the device does at best, measured in the same run as what it is compared with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jq.bench.timing import Clock, time_calls
from jq.errors import SpecError

_SAMPLES = 5
_LONG_ENOUGH_S = 20e-3
_SMALLEST, _LARGEST = 256, 8192


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The best of several tries each.

    Attributes:
        copy_bytes_per_second: of a program that reads and writes; both are counted.
        read_bytes_per_second: of a program that reads, and writes next to nothing.
        products_per_second: dtype -> operations (a product and a sum are two) of square matrix
            products of random numbers by XLA.
    """

    copy_bytes_per_second: float
    read_bytes_per_second: float
    products_per_second: Mapping[str, float]

    @property
    def bytes_per_second(self) -> float:
        """The faster of reading and copying: weights and caches are read more than written."""
        return max(self.copy_bytes_per_second, self.read_bytes_per_second)

    def rate(self, dtype: str) -> float:
        """Operations per second; SpecError for a dtype that was not measured."""
        if dtype not in self.products_per_second:
            raise SpecError(
                f"no rate of {dtype} products was measured, only of "
                f"{', '.join(self.products_per_second)}; measure the ceilings with {dtype} too"
            )
        return self.products_per_second[dtype]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self) | {"bytes_per_second": self.bytes_per_second}


def measure_ceilings(
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    *,
    buffer_bytes: int | None = None,
    largest: int = _LARGEST,
    clock: Clock = time.perf_counter,
) -> Ceilings:
    """Measure JAX's default device.

    Args:
      dtypes: of the matrix products; int8 sums in int32, all others in float32.
      buffer_bytes: of the array that is read and copied; None is 256 MB on a CPU and 2 GB on
        anything else, more than their caches hold.
      largest: side of the largest matrices to try.
      clock: seconds.
    """
    if buffer_bytes is None:
        buffer_bytes = 1 << (28 if jax.default_backend() == "cpu" else 31)
    rates = {dtype: _product_rate(dtype, largest, clock) for dtype in dict.fromkeys(dtypes)}
    words = jax.random.bits(jax.random.key(0), (max(buffer_bytes // 4096, 1), 1024))
    read = words.nbytes / _best(lambda: _maxima(words), clock)
    held = [words]
    del words

    def copy() -> jax.Array:
        held[0] = _flip(held[0])  # into the same memory: calls in a row do not add up
        return held[0]

    return Ceilings(2 * held[0].nbytes / _best(copy, clock), read, rates)


@jax.jit
def _maxima(words: jax.Array) -> jax.Array:
    # Along the rows: a processor's vector units then work on neighbours.
    return jnp.max(words, axis=0)


@partial(jax.jit, donate_argnums=0)
def _flip(words: jax.Array) -> jax.Array:
    return words ^ jnp.uint32(1)


@jax.jit
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jnp.matmul(x, w, preferred_element_type=sums)


def _product_rate(dtype: str, largest: int, clock: Clock) -> float:
    """The best rate of growing sizes, until one takes long enough to be measured well."""
    best, size = 0.0, min(_SMALLEST, largest)
    while True:
        seconds = _best(partial(_product, *_operands(dtype, size)), clock)
        best = max(best, 2 * size**3 / seconds)
        if seconds > _LONG_ENOUGH_S or 2 * size > largest:
            return best
        size *= 2


def _operands(dtype: str, size: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    if dtype == "int8":
        return [jax.random.randint(key, (size, size), -127, 128, jnp.int8) for key in keys]
    # Random numbers: on a GPU products of zeros run faster than any real ones.
    return [jax.random.normal(key, (size, size)).astype(dtype) for key in keys]


def _best(call: Any, clock: Clock) -> float:
    _, latency = time_calls(call, samples=_SAMPLES, sample_seconds=_LONG_ENOUGH_S, clock=clock)
    return min(latency.seconds)
