"""Which tile sizes a product runs with on Ampere and Ada: those with the smallest estimate.

No measurement has been made.  `Device` holds data-sheet rates per clock cycle; what is assumed
beside them is good for ranking at best.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from jq.pallas_kernels.ampere.config import SHARED_MEMORY, SPARE, W4Config, W8Config


@dataclasses.dataclass(frozen=True)
class Device:
    """cores: multiprocessors.  Per clock and multiprocessor: dram: bytes; l2: bytes, assumed;
    half, eight: multiply-adds of 16-bit and 8-bit operands."""

    cores: int
    dram: float
    l2: float
    half: float
    eight: float


# An A100 (40 GB), an RTX 3090 and an RTX 4090.
DEVICES = {
    (8, 0): Device(108, 10.2, 40.0, 1024, 2048),
    (8, 6): Device(82, 6.7, 24.0, 256, 1024),
    (8, 9): Device(128, 3.1, 20.0, 256, 1024),
}

# The int4 product: few rows get narrow blocks for the sake of their number, or deep stages.
W4_CANDIDATES: tuple[W4Config, ...] = tuple(
    W4Config(block_m, tiles, slices, stages, split)
    for block_m, tiles, slices, stages in (
        (16, 2, 2, 4),
        (16, 1, 2, 4),
        (16, 1, 1, 4),
        (32, 2, 2, 3),
        (32, 1, 1, 4),
        (64, 2, 1, 4),
        (64, 2, 1, 3),
        (64, 1, 1, 4),
        (64, 1, 1, 3),
    )
    for split in ((1,) if block_m == 64 else (1, 2, 4, 8))
)
W8_CANDIDATES: tuple[W8Config, ...] = tuple(
    W8Config(block_m, block_n, slices, stages, split)
    for block_m, block_n, slices, stages in (
        (16, 64, 2, 4),
        (16, 64, 1, 4),
        (16, 128, 2, 3),
        (32, 64, 2, 3),
        (32, 128, 2, 3),
        (64, 64, 1, 4),
        (64, 128, 1, 4),
        (64, 128, 2, 3),
        (128, 128, 1, 4),
        (128, 128, 1, 3),
    )
    for split in ((1,) if block_m >= 64 else (1, 2, 4, 8))
)

_LATENCY = 700.0  # clocks from a copy's start to its end
_LAUNCH, _FILL, _ADD = 3000.0, 1500.0, 3000.0
_REGISTERS = 65536


@functools.lru_cache(maxsize=4096)
def choose_w4(
    m: int, k: int, n: int, symmetric: bool, compute_capability: tuple[int, int]
) -> W4Config:
    """The tile sizes for x [m, k] @ w [k, n] with an int4 weight: of equal estimates the first."""
    fitting = [c for c in W4_CANDIDATES if not unsuitable_w4(c, k, n, compute_capability)]
    return min(fitting, key=lambda c: estimate_w4(c, m, k, n, symmetric, compute_capability))


@functools.lru_cache(maxsize=4096)
def choose_w8(
    m: int, k: int, n: int, dtype: str, block: int | None, compute_capability: tuple[int, int]
) -> W8Config:
    """The tile sizes for x [m, k] @ w [k, n] with 8-bit codes: of equal estimates the first."""
    fitting = [
        c for c in W8_CANDIDATES if not unsuitable_w8(c, k, n, dtype, block, compute_capability)
    ]
    return min(fitting, key=lambda c: estimate_w8(c, m, k, n, compute_capability))


def unsuitable_w4(
    config: W4Config, k: int, n: int, compute_capability: tuple[int, int]
) -> str | None:
    """Why these tile sizes do not multiply a weight [k, n] on such a device, or None."""
    return _unsuitable(config, k, n, compute_capability)


def unsuitable_w8(
    config: W8Config,
    k: int,
    n: int,
    dtype: str,
    block: int | None,
    compute_capability: tuple[int, int],
) -> str | None:
    """Why these tile sizes do not multiply codes of a dtype [k, n] on such a device, or None."""
    if dtype != "int8" and config.block_m > 64:
        return f"{config}: float8 sums of {config.block_m} rows, kept twice, fill the registers"
    if block is not None and config.slices < 2:
        return f"{config}: a stage has to hold the 128 inputs of a block with one scale"
    return _unsuitable(config, k, n, compute_capability)


def _unsuitable(config: W4Config | W8Config, k: int, n: int, capability) -> str | None:
    needed, limit = config.shared_bytes() + SPARE, SHARED_MEMORY[capability]
    if needed > limit:
        major, minor = capability
        return f"{config} needs {needed} bytes of shared memory, {major}.{minor} has {limit}"
    if n % config.block_n:
        return f"{config}: N = {n} is no multiple of {config.block_n}"
    if k % (64 * config.slices):
        return f"{config}: K = {k} is no multiple of {64 * config.slices}"
    if k // (64 * config.slices) < config.split:
        return f"{config}: K = {k} does not split into {config.split}"
    return None


def estimate_w4(
    config: W4Config, m: int, k: int, n: int, symmetric: bool, capability: tuple[int, int]
) -> float:
    """Clock cycles of x [m, k] @ w [k, n], for comparison with other configs."""
    # Instructions of a warp for a 64 x 64 tile, as assembled: the conversion, the copies, and the
    # products and loads of each 16 rows.
    tile = (70 if symmetric else 95) + 10 * config.block_m / 16
    stage = config.slices * (2048 * config.tiles + 128 * config.block_m)
    return _clocks(
        config,
        DEVICES[capability],
        (m, k, n),
        issue=config.tiles * tile,
        rate=DEVICES[capability].half,
        stage=stage,
        weight=k * n / 2,
        capability=capability,
    )


def estimate_w8(config: W8Config, m: int, k: int, n: int, capability: tuple[int, int]) -> float:
    """Clock cycles of x [m, k] @ w [k, n], for comparison with other configs."""
    products = config.block_m * config.block_n * 64 / (16 * 8 * 32 * 4)
    loads = (config.block_m + config.block_n) / 8
    return _clocks(
        config,
        DEVICES[capability],
        (m, k, n),
        issue=1.3 * products + loads + 20,
        rate=DEVICES[capability].eight,
        stage=64 * config.slices * (config.block_m + config.block_n),
        weight=k * n,
        capability=capability,
    )


def _clocks(config, device: Device, size, *, issue, rate, stage, weight, capability) -> float:
    """issue: instructions of a warp for 64 inputs.  stage, weight: bytes."""
    m, k, n = size
    blocks = math.ceil(m / config.block_m) * (n // config.block_n) * config.split
    slices = math.ceil(k / 64 / config.split)
    shared = (SHARED_MEMORY[capability] + 1024) // (config.shared_bytes() + SPARE + 1024)
    sums = config.block_m * config.block_n
    registers = _REGISTERS // (128 * (72 + sums // 128))
    resident = max(1, min(shared, registers, math.ceil(blocks / device.cores)))
    busiest = math.ceil(blocks / device.cores)
    # A warp of each block shares a scheduler; alone it does not fill its slots.
    issued = busiest * slices * issue * max(1.0, 1.5 / resident)
    multiplied = busiest * slices * 64 * sums / rate
    copied = busiest * slices / config.slices * stage
    demands = (
        issued,
        multiplied,
        copied / device.l2,
        copied * _LATENCY / (resident * (config.stages - 1) * stage),
        weight / (device.cores * device.dram),
    )
    # What overlaps never overlaps wholly: of two that are bound alike, the one that does less.
    busy = 0.9 * max(demands) + 0.1 * sum(demands)
    total = _LAUNCH + _FILL + busy + busiest * sums * 4 / 64
    if config.split > 1:
        total += _ADD + 8 * config.split * m * n / (device.cores * device.l2)
    return total
