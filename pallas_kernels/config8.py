"""Tile sizes of the W8A8 kernels for Hopper."""

from __future__ import annotations

import dataclasses

from jq.pallas_kernels.config import fits, member

SLICE = 128  # inputs that are multiplied at once: a row of them fills the swizzle's 128 bytes
BARRIERS = 512  # bytes that they take at most


@dataclasses.dataclass(frozen=True)
class Decode8Config:
    """Of the kernel for few rows.

    block_m: rows of x per block: 8, 16, 32 or 64.
    slices: 128-input slices per stage, 1 to 4.
    stages: copies in flight.
    warpgroups: that multiply 64 columns each, beside the one that copies: 1 to 4.
    split: blocks of a cluster that share the inputs: 1, 2, 4 or 8.
    pdl: start while the kernel before is still running (programmatic dependent launch), where that
      one allows it, and read weights until it ends; allow the same to the next one.
    """

    block_m: int = 16
    slices: int = 2
    stages: int = 4
    warpgroups: int = 2
    split: int = 1
    pdl: bool = False

    def __post_init__(self):
        member(self, "block_m", (8, 16, 32, 64))
        member(self, "slices", (1, 2, 3, 4))
        member(self, "stages", range(2, 17))
        member(self, "warpgroups", (1, 2, 3, 4))
        member(self, "split", (1, 2, 4, 8))
        fits(self, BARRIERS)

    @property
    def block_n(self) -> int:
        return 64 * self.warpgroups

    @property
    def name(self) -> str:
        return (
            f"decode8_m{self.block_m}_k{SLICE * self.slices}x{self.stages}"
            f"_n{self.block_n}_split{self.split}" + "_pdl" * self.pdl
        )

    def shared_bytes(self) -> int:
        """Upper bound over the formats, but for the barriers."""
        stage = (self.block_m + self.block_n) * SLICE * self.slices
        # The result, and what the other blocks send; the scales, the bias.
        tile = self.block_m * self.block_n * (2 + 4 * (self.split - 1))
        rows = scale_rows(self.block_m)
        scales = max(self.stages * self.slices * rows, rows + self.block_n)
        return self.stages * stage + tile + _aligned(4 * scales) + _aligned(4 * self.block_n)


@dataclasses.dataclass(frozen=True)
class Prefill8Config:
    """Of the kernel for many rows: blocks of 64 * warpgroups rows x `block_n` columns, one per
    multiprocessor at a time.

    warpgroups: that multiply 64 rows each, beside the one that copies: 1, 2 or 3.
    block_n: columns: 64, 128, 192 or 256; for float8, whose sums are kept twice, and with three
      warpgroups, which have fewer registers each, at most 128.
    stages: copies in flight, each of 128 inputs.
    multicast: "x": two blocks of a cluster with the same rows fetch each row of x once; "w": two
      with the same columns fetch each column of the weight once; None: each fetches its own.
    snake: blocks of rows that are walked together, for the L2 cache's sake.
    """

    warpgroups: int = 2
    block_n: int = 128
    stages: int = 4
    multicast: str | None = None
    snake: int = 8

    def __post_init__(self):
        member(self, "warpgroups", (1, 2, 3))
        member(self, "block_n", (64, 128, 192, 256))
        member(self, "stages", range(2, 17))
        member(self, "multicast", (None, "x", "w"))
        if self.warpgroups == 3 and self.block_n > 128:
            raise ValueError(
                f"{self}: the sums of three warpgroups' 192 columns fill the registers"
            )
        fits(self, BARRIERS)

    @property
    def block_m(self) -> int:
        return 64 * self.warpgroups

    @property
    def name(self) -> str:
        shared = f"_multicast_{self.multicast}" if self.multicast else ""
        return f"prefill8_{self.block_m}x{self.block_n}_x{self.stages}{shared}"

    def unsupported(self, dtype: str) -> str | None:
        """Why the kernel does not multiply codes of this dtype with these sizes, or None."""
        if dtype == "float8_e4m3fn" and self.block_n > 128:
            return f"{self}: float8 sums of {self.block_n} columns, kept twice, fill the registers"
        return None

    def shared_bytes(self) -> int:
        """Upper bound over the formats, but for the barriers."""
        stage = (self.block_m + self.block_n) * SLICE
        # Two 64 x 64 pieces of each warpgroup's result; the scales.
        pieces = self.warpgroups * 2 * 64 * 64 * 2
        scales = self.block_m + self.block_n
        if self.unsupported("float8_e4m3fn") is None:
            scales = max(scales, self.stages * self.block_m)
        return self.stages * stage + pieces + _aligned(4 * scales)


Config8 = Decode8Config | Prefill8Config


def scale_rows(block_m: int) -> int:
    """Rows whose scales one copy brings: 128 bytes are the least."""
    return max(32, block_m)


def _aligned(size: int) -> int:
    """Every piece of shared memory starts at a whole kilobyte."""
    return -(-size // 1024) * 1024
