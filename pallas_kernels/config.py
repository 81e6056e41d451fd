"""Tile sizes of the W4A16 kernels."""

from __future__ import annotations

import dataclasses

SHARED_MEMORY = 227 * 1024  # bytes that a block may use on compute capability 9.0
BARRIERS = 1024  # bytes that they and alignment take at most


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Of the kernel for few rows.

    block_m: rows of x per block: 8, 16, 32 or 64.
    slices: 64-input slices per stage, 2 to 4.
    stages: copies in flight.
    warpgroups: that multiply, beside the one that copies: 1, 2 or 3.
    tiles: 64-column tiles of each of them, 1 or 2.
    split: blocks of a cluster that share the inputs: 1, 2, 4 or 8.
    pdl: start while the kernel before is still running (programmatic dependent launch), where that
      one allows it, and read weights until it ends; allow the same to the next one.
    """

    block_m: int = 16
    slices: int = 4
    stages: int = 4
    warpgroups: int = 2
    tiles: int = 1
    split: int = 1
    pdl: bool = False

    def __post_init__(self):
        member(self, "block_m", (8, 16, 32, 64))
        member(self, "slices", (2, 3, 4))
        member(self, "stages", range(2, 17))
        member(self, "warpgroups", (1, 2, 3))
        member(self, "tiles", (1, 2))
        member(self, "split", (1, 2, 4, 8))
        if self.block_n > 256:
            raise ValueError(f"{self}: one copy brings 256 columns at most, not {self.block_n}")
        fits(self, BARRIERS)

    @property
    def block_n(self) -> int:
        return 64 * self.warpgroups * self.tiles

    @property
    def name(self) -> str:
        return (
            f"decode_m{self.block_m}_k{64 * self.slices}x{self.stages}"
            f"_n{self.warpgroups}x{64 * self.tiles}_split{self.split}" + "_pdl" * self.pdl
        )

    def shared_bytes(self) -> int:
        """Upper bound over the formats (group size 32 with zero points)."""
        inputs = 64 * self.slices
        stage = 2 * self.block_m * inputs + self.block_n * inputs // 2
        stage += 2 * 2 * self.block_n * inputs // 32
        tile = self.block_m * self.block_n
        return self.stages * stage + 4 * self.block_n + tile * (2 + 4 * (self.split - 1))


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Of the kernel for many rows: blocks of `block_m` x 128, one per multiprocessor at a time.

    block_m: rows of x per block: 64, 128 or 256.
    stages: copies in flight, each of 64 inputs; even.
    multicast: two blocks of a cluster with the same rows fetch each row of x once.
    snake: blocks of rows that are walked together, for the L2 cache's sake.
    """

    block_m: int = 256
    stages: int = 4
    multicast: bool = False
    snake: int = 8

    warpgroups = 2
    block_n = 128

    def __post_init__(self):
        member(self, "block_m", (64, 128, 256))
        member(self, "stages", range(2, 17, 2))
        fits(self, BARRIERS)

    @property
    def name(self) -> str:
        return f"prefill_m{self.block_m}_x{self.stages}" + "_multicast" * self.multicast

    def shared_bytes(self) -> int:
        """Upper bound over the formats (group size 32 with zero points)."""
        stage = 2 * self.block_m * 64 + self.block_n * 32 + 2 * 2 * self.block_n * 2
        return self.stages * stage + 2 * self.block_m * self.block_n


Config = DecodeConfig | PrefillConfig


def member(config, name: str, allowed) -> None:
    """Raise ValueError for a field that is none of the allowed values."""
    if getattr(config, name) not in allowed:
        raise ValueError(f"{config}: {name} has to be one of {', '.join(map(str, allowed))}")


def fits(
    config,
    spare: int,
    there_are: int = SHARED_MEMORY,
    way_out: str = "fewer stages, or a smaller split",
) -> None:
    """Raise ValueError where a block's shared memory does not hold the config and `spare` bytes."""
    needed = config.shared_bytes() + spare
    if needed > there_are:
        raise ValueError(
            f"{config} needs {needed} bytes of shared memory, there are {there_are}: take {way_out}"
        )
