"""Which tile sizes a W8A8 product runs with on Hopper: measured ones, else an estimate.

As `tuning`, whose buckets of rows and rates of the device it shares: `TABLE` holds what
`scripts/gpu_check.py` found fastest, and `estimate` ranks the candidates for everything else, from
data-sheet rates and assumptions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jq.pallas_kernels.compat import CORES
from jq.pallas_kernels.config8 import SLICE, Config8, Decode8Config, Prefill8Config
from jq.pallas_kernels.tuning import (
    DRAM_BYTES,
    FILL,
    L2_BYTES,
    L2_BYTES_ALONE,
    LAUNCH,
    MOST_DECODED,
    REDUCE,
    WGMMA_CLOCKS,
    bucket,
    entries,
)


@dataclasses.dataclass(frozen=True)
class Key8:
    """A product as the table knows it: rows count by their bucket, 0 being the one of most.
    dtype: of the codes.  block: 128 for block scales, else None."""

    k: int
    n: int
    bucket: int
    dtype: str
    block: int | None


def table(rows: Iterable[Mapping[str, Any]]) -> dict[Key8, Config8 | None]:
    """A tuning table from rows of measurements.

    Each row has `k`, `n`, `m`, `dtype` ("int8" or "float8_e4m3fn"), `block` (128 or None), `kernel`
    ("decode8" or "prefill8") and `config`, the fields of that kernel's Config.  Where XLA's own
    product was faster than every config, `kernel` is "reference" and the entry None.
    Raises: KeyError, TypeError or ValueError for rows that are none; ValueError for two rows with
      the same key.
    """

    def key(row: Mapping[str, Any]) -> Key8:
        return Key8(row["k"], row["n"], bucket(row["m"]), row["dtype"], row["block"])

    return entries(rows, key, {"decode8": Decode8Config, "prefill8": Prefill8Config})


# No measurement has been made yet.
TABLE: dict[Key8, Config8 | None] = table(())


def slower_than_xla(m: int, k: int, n: int, *, dtype: str, block: int | None) -> bool:
    """Whether no config was measured to be as fast as XLA's own product."""
    return TABLE.get(Key8(k, n, bucket(m), dtype, block), True) is None


def choose(m: int, k: int, n: int, *, dtype: str, block: int | None) -> Config8:
    """The tile sizes for x [m, k] @ w [k, n]."""
    return TABLE.get(Key8(k, n, bucket(m), dtype, block)) or heuristic(m, k, n, dtype)


@functools.lru_cache(maxsize=4096)
def heuristic(m: int, k: int, n: int, dtype: str) -> Config8:
    """The candidate with the smallest estimate; of equal ones the first."""
    return min(candidates(dtype), key=lambda config: estimate(config, m, k, n))


def candidates(dtype: str) -> tuple[Config8, ...]:
    """What `heuristic` may answer for codes of a dtype."""
    prefill = [config for config in _PREFILL if config.unsupported(dtype) is None]
    return (*_DECODE, *prefill)


# Blocks of 8 and 16 rows leave room for a second one beside them.
_DECODE = (
    *(Decode8Config(8, slices=2, stages=3, split=split) for split in (1, 2, 4, 8)),
    *(Decode8Config(8, stages=5, warpgroups=1, split=split) for split in (1, 2)),
    *(Decode8Config(16, slices=2, stages=3, split=split) for split in (1, 2, 4, 8)),
    *(Decode8Config(16, stages=5, warpgroups=1, split=split) for split in (1, 2)),
    *(Decode8Config(32, slices=2, stages=4, split=split) for split in (1, 2, 4)),
    *(Decode8Config(32, slices=1, stages=4, warpgroups=4, split=split) for split in (1, 2)),
    *(Decode8Config(64, slices=1, stages=6, split=split) for split in (1, 2)),
    Decode8Config(64, slices=1, stages=4, split=4),
    Decode8Config(64, slices=1, stages=4, warpgroups=4),
)
_PREFILL = (
    Prefill8Config(1, 128, stages=6),
    Prefill8Config(2, 64, stages=6),
    Prefill8Config(2, 128, stages=5),
    Prefill8Config(2, 128, stages=5, multicast="x"),
    Prefill8Config(2, 128, stages=5, multicast="w"),
    Prefill8Config(3, 128, stages=4),
    Prefill8Config(3, 128, stages=4, multicast="x"),
    Prefill8Config(2, 256, stages=4),
    Prefill8Config(2, 256, stages=4, multicast="w"),
)

_PRODUCTS = 4096.0  # 8-bit multiply-adds per clock and multiprocessor


def estimate(config: Config8, m: int, k: int, n: int) -> float:
    """Clock cycles of x [m, k] @ w [k, n], for comparison with other configs."""
    rows = columns = split = pair = 1
    if isinstance(config, Decode8Config):
        if m > MOST_DECODED:
            return math.inf
        split, inputs = config.split, SLICE * config.slices
        # The weight's columns are the instruction's 64, the rows its n.
        instructions = config.warpgroups
    else:
        rows = 2 if config.multicast == "w" else 1
        columns = 2 if config.multicast == "x" else 1
        pair, inputs = rows * columns, SLICE
        instructions = config.warpgroups
    steps = math.ceil(k / (inputs * split)) * inputs // SLICE
    clusters = math.ceil(m / (config.block_m * rows)) * math.ceil(n / (config.block_n * columns))
    # Blocks that the busiest multiprocessor gets, and slices of each.
    waves = math.ceil(clusters * split / (CORES // pair))
    tile = config.block_m * config.block_n
    tensor = max(4 * instructions * WGMMA_CLOCKS, tile * SLICE / _PRODUCTS)
    traffic = SLICE * (config.block_m / columns + config.block_n / rows)
    busy = max(
        waves * steps * tensor,
        waves * steps * traffic / L2_BYTES_ALONE,
        clusters * pair * split * steps * traffic / (CORES * L2_BYTES),
        k * n / (CORES * DRAM_BYTES),
    )
    # Sums leave through shared memory while this block multiplies nothing.
    reduction = REDUCE + (split - 1) * tile * 4 / L2_BYTES_ALONE if split > 1 else 0.0
    return LAUNCH + FILL + busy + waves * tile * 4 / 128 + reduction
