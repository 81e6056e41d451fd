"""The family of the GPU at hand: which kernels it has, and the tile sizes they are tried with.

On Ampere and Ada everything is checked and timed with the tile sizes that the kernels choose, and
what is tuned is skipped: the tables of measured tile sizes are Hopper's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from jq.pallas_kernels.ampere import tuning
from jq.pallas_kernels.ampere.config import CAPABILITIES, W4Config, W8Config
from jq.pallas_kernels.capability import ADA, HOPPER, told
from scripts.gpu.problems import Problem
from scripts.gpu.problems8 import FP8, Problem8


@functools.cache
def here() -> tuple[int, int]:
    """Of the first device; a Hopper's where that is no GPU, as what is compiled then is for one."""
    import jax

    return told(getattr(jax.devices()[0], "compute_capability", None)) or HOPPER


def ampere() -> bool:
    """Whether the kernels of `jq.pallas_kernels.ampere` are those that run."""
    return here() in CAPABILITIES


def possible(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items but those that need float8 where the tensor cores have none."""
    return [item for item in items if here() >= ADA or not _float8(item)]


def _float8(item: Mapping[str, Any]) -> bool:
    return FP8 in (item.get("problem8", {}).get("dtype"), *item.get("rows", ()))


def int4_configs() -> Iterator[tuple[Problem, W4Config]]:
    """A problem for all that may be chosen: two formats, and sizes that leave remainders."""
    for group, symmetric in ((128, True), (32, False)):
        for config in tuning.W4_CANDIDATES:
            p = Problem(2 * config.block_m - 3, 4096, 1280, group, symmetric)
            if tuning.unsuitable_w4(config, p.k, p.n, here()) is None:
                yield p, config


def eight_bit_configs() -> Iterator[tuple[Problem8, W8Config]]:
    """The same for 8-bit codes, in three formats."""
    for dtype, block in (("int8", False), (FP8, False), (FP8, True)):
        for config in tuning.W8_CANDIDATES:
            p = Problem8(2 * config.block_m - 3, 4096, 1280, dtype, block)
            size = 128 if block else None
            if tuning.unsuitable_w8(config, p.k, p.n, dtype, size, here()) is None:
                yield p, config
