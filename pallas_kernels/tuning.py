"""Which tile sizes a product runs with: measured ones where there are some, else an estimate.

`TABLE` holds what `scripts/gpu_check.py` found fastest.  For everything else `estimate` adds up, in
clock cycles of one multiprocessor, what a candidate has to read, issue and multiply; its constants
are data-sheet rates and assumptions, not measurements, and good for ranking at best.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jq.pallas_kernels.compat import CORES
from jq.pallas_kernels.config import Config, DecodeConfig, PrefillConfig

BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Key:
    """A product as the table knows it: rows count by their bucket, 0 being the one of most."""

    k: int
    n: int
    bucket: int
    dtype: str
    group_size: int | None
    symmetric: bool


def bucket(m: int) -> int:
    """The smallest bucket that holds m rows, or 0."""
    return next((b for b in BUCKETS if m <= b), 0)


def table(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Config | None]:
    """A tuning table from rows of measurements.

    Each row has `k`, `n`, `m`, `dtype`, `group_size` (None per channel), `symmetric`, `kernel`
    ("decode" or "prefill") and `config`, the fields of that kernel's Config.  Where XLA's own
    product was faster than every config, `kernel` is "reference" and the entry None.
    Raises: KeyError, TypeError or ValueError for rows that are none; ValueError for two rows with
      the same key.
    """

    def key(row: Mapping[str, Any]) -> Key:
        fmt = (row["dtype"], row["group_size"], row["symmetric"])
        return Key(row["k"], row["n"], bucket(row["m"]), *fmt)

    return entries(rows, key, {"decode": DecodeConfig, "prefill": PrefillConfig})


def entries(
    rows: Iterable[Mapping[str, Any]],
    key_of: Callable[[Mapping[str, Any]], Any],
    configs: Mapping[str, Callable[..., Any]],
) -> dict[Any, Any]:
    """Rows of measurements by their keys: each one's config, or None for XLA's own product.

    configs: by the name of the kernel.
    Raises: see `table`.
    """
    result: dict[Any, Any] = {}
    for row in rows:
        key = key_of(row)
        if key in result:
            raise ValueError(f"two measurements for {key}: keep the faster one")
        kernel = row["kernel"]
        result[key] = None if kernel == "reference" else configs[kernel](**row["config"])
    return result


# No measurement has been made yet.
TABLE: dict[Key, Config | None] = table(())


def slower_than_xla(
    m: int, k: int, n: int, *, dtype: str, group_size: int | None, symmetric: bool
) -> bool:
    """Whether no config was measured to be as fast as XLA's own product."""
    return TABLE.get(Key(k, n, bucket(m), dtype, group_size, symmetric), True) is None


def choose(
    m: int, k: int, n: int, *, dtype: str, group_size: int | None, symmetric: bool
) -> Config:
    """The tile sizes for x [m, k] @ w [k, n]."""
    measured = TABLE.get(Key(k, n, bucket(m), dtype, group_size, symmetric))
    return measured or heuristic(m, k, n, symmetric)


@functools.lru_cache(maxsize=4096)
def heuristic(m: int, k: int, n: int, symmetric: bool = True) -> Config:
    """The candidate with the smallest estimate; of equal ones the first."""
    return min(CANDIDATES, key=lambda config: estimate(config, m, k, n, symmetric))


# What `heuristic` may answer.  Blocks of 8 and 16 rows leave room for a second one beside them;
# the larger ones trade stages for the sums that a split brings.
CANDIDATES: tuple[Config, ...] = (
    *(DecodeConfig(8, slices=4, stages=4, split=split) for split in (1, 2, 4, 8)),
    *(DecodeConfig(16, slices=4, stages=4, split=split) for split in (1, 2, 4, 8)),
    *(DecodeConfig(32, slices=4, stages=4, split=split) for split in (1, 2, 4)),
    DecodeConfig(32, slices=2, stages=5, split=8),
    *(DecodeConfig(32, slices=2, stages=4, tiles=2, split=split) for split in (1, 2)),
    *(DecodeConfig(64, slices=2, stages=5, split=split) for split in (1, 2)),
    DecodeConfig(64, slices=2, stages=3, split=4),
    DecodeConfig(64, slices=2, stages=4, tiles=2),
    PrefillConfig(64, stages=8),
    PrefillConfig(128, stages=6),
    PrefillConfig(256, stages=4),
    PrefillConfig(256, stages=4, multicast=True),
)

# Above this many rows only the prefill kernel is considered.
MOST_DECODED = 256

# Per clock and multiprocessor: an H200's 4.3 TB/s of achievable bandwidth and 1.98 GHz, and what
# its L2 cache is assumed to give to all of them and to a single one.
DRAM_BYTES, L2_BYTES, L2_BYTES_ALONE = 16.5, 26.0, 40.0
_PRODUCTS = 2048.0  # 16-bit multiply-adds
WGMMA_CLOCKS = 16.0  # at least, of a 64 x n x 16 instruction (8 bits: x 32)
LAUNCH, FILL, REDUCE = 3000.0, 1500.0, 1500.0
_SLOTS = {True: 70.0, False: 85.0}  # issued per 64 x 64 tile of the weight


def estimate(config: Config, m: int, k: int, n: int, symmetric: bool = True) -> float:
    """Clock cycles of x [m, k] @ w [k, n], for comparison with other configs."""
    if isinstance(config, DecodeConfig):
        if m > MOST_DECODED:
            return math.inf
        split, pair, inputs = config.split, 1, 64 * config.slices
    else:
        split, pair, inputs = 1, 1 + config.multicast, 128
    slices = math.ceil(k / (inputs * split)) * inputs // 64
    clusters = math.ceil(m / config.block_m) * math.ceil(n / (config.block_n * pair))
    # Blocks that the busiest multiprocessor gets, and 64 x 64 tiles of each.
    waves = math.ceil(clusters * split / (CORES // pair))
    tiles = slices * config.block_n / 64
    tensor = 4 * max(WGMMA_CLOCKS, 64 * 16 * config.block_m / _PRODUCTS)
    traffic = tiles * 2048 + 128.0 * config.block_m * slices / pair
    busy = max(
        waves * tiles * _SLOTS[symmetric],
        waves * tiles * tensor,
        waves * traffic / L2_BYTES_ALONE,
        clusters * pair * split * traffic / (CORES * L2_BYTES),
        k * n / 2 / (CORES * DRAM_BYTES),
    )
    # Sums leave through shared memory while no tile is multiplied.
    sums = config.block_m * config.block_n * 4
    reduction = REDUCE + (split - 1) * sums / L2_BYTES_ALONE if split > 1 else 0.0
    return LAUNCH + FILL + busy + waves * sums / 128 + reduction
