"""Tile sizes of the kernels for Ampere and Ada."""

from __future__ import annotations

import dataclasses

from jq.pallas_kernels.config import fits, member

# Bytes of shared memory that a block may use; a multiprocessor has a kilobyte more.
SHARED_MEMORY = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024}
CAPABILITIES = tuple(SHARED_MEMORY)
SPARE = 1024  # alignment


@dataclasses.dataclass(frozen=True)
class Sizes:
    """stages: slots of shared memory. copies: that fill one."""

    stages: int
    copies: int


@dataclasses.dataclass(frozen=True)
class W4Config:
    """Of the int4 product.

    block_m: rows of x per block: 16, 32 or 64.
    tiles: 64-column tiles per block, 1 or 2.
    slices: 64-input slices per stage, 1, 2 or 4.
    stages: 2 or more; one is multiplied, the others are being copied.
    split: blocks that share the inputs of a tile; XLA adds their sums.
    snake: blocks of rows that are walked together, for the L2 cache's sake.
    """

    block_m: int = 16
    tiles: int = 2
    slices: int = 2
    stages: int = 4
    split: int = 1
    snake: int = 8

    def __post_init__(self):
        member(self, "block_m", (16, 32, 64))
        member(self, "tiles", (1, 2))
        member(self, "slices", (1, 2, 4))
        member(self, "stages", range(2, 9))
        member(self, "split", range(1, 17))
        fits(self, SPARE, max(SHARED_MEMORY.values()), "fewer stages")

    @property
    def block_n(self) -> int:
        return 64 * self.tiles

    @property
    def name(self) -> str:
        return (
            f"m{self.block_m}_n{self.block_n}_k{64 * self.slices}x{self.stages}_split{self.split}"
        )

    def shared_bytes(self) -> int:
        stage = self.slices * (2048 * self.tiles + 128 * self.block_m)
        sums = self.block_m * self.block_n * (2 if self.split == 1 else 4)
        return max(self.stages * stage, sums)


@dataclasses.dataclass(frozen=True)
class W8Config:
    """Of the 8-bit products.

    block_m, block_n: rows and columns per block: 16, 32, 64 or 128, and 64 or 128; for float8,
      whose sums are kept twice, at most 64 rows.
    slices: 64-input slices per stage, 1, 2 or 4; of float8 with scales per block, 2 or 4.
    stages: 2 or more; one is multiplied, the others are being copied.
    split: blocks that share the inputs of a tile; XLA adds their sums.
    snake: blocks of rows that are walked together, for the L2 cache's sake.
    """

    block_m: int = 16
    block_n: int = 64
    slices: int = 2
    stages: int = 4
    split: int = 1
    snake: int = 8

    def __post_init__(self):
        member(self, "block_m", (16, 32, 64, 128))
        member(self, "block_n", (64, 128))
        member(self, "slices", (1, 2, 4))
        member(self, "stages", range(2, 9))
        member(self, "split", range(1, 17))
        fits(self, SPARE, max(SHARED_MEMORY.values()), "fewer stages")

    @property
    def name(self) -> str:
        return (
            f"m{self.block_m}_n{self.block_n}_k{64 * self.slices}x{self.stages}_split{self.split}"
        )

    def shared_bytes(self) -> int:
        stage = 64 * self.slices * (self.block_m + self.block_n)
        sums = self.block_m * self.block_n * (2 if self.split == 1 else 4)
        return max(self.stages * stage, sums)
