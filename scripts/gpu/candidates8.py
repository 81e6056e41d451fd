"""Which tile sizes of the 8-bit kernels are tried (see `candidates`)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from jq.pallas_kernels import tuning8
from jq.pallas_kernels.ampere.config import W8Config
from jq.pallas_kernels.config import SHARED_MEMORY
from jq.pallas_kernels.config8 import Config8, Decode8Config, Prefill8Config
from scripts.gpu import family
from scripts.gpu.candidates import block_m, deepest, fits
from scripts.gpu.problems8 import FP8, Problem8

# (K, N): a single tile, sizes that no block divides, a long K.
ODD_SIZES = ((64, 64), (192, 192), (320, 448), (1088, 576), (4160, 320), (12800, 128))
MOST = 8
_TWO_BLOCKS = SHARED_MEMORY // 2 - 2048


def configs(p: Problem8) -> list[Config8]:
    """Candidates for a problem, the kernels' own choice first; of both kernels where either may
    win."""
    choice = tuning8.choose(p.m, p.k, p.n, **p.format)
    few = decode_configs(p) if p.m <= 256 else []
    many = prefill_configs(p) if p.m > 32 else []
    early = [dataclasses.replace(c, pdl=True) for c in few[:2] if p.m <= 32]
    return list(dict.fromkeys([choice, *few, *early, *many]))


def decode_configs(p: Problem8) -> list[Decode8Config]:
    """Candidates for few rows: of each way to cut the weight in turn, that first which the estimate
    puts first; with two blocks on each multiprocessor, or one with deep buffers."""
    # A last block without inputs only waits.
    found = [c for c in _decode_grid(min(64, block_m(p.m))) if p.k > 128 * c.slices * c.split]
    found.sort(key=lambda c: (tuning8.estimate(c, p.m, p.k, p.n), abs(c.slices - 2)))
    ways: dict[tuple[int, int], list[Decode8Config]] = {}
    for config in found:
        ways.setdefault((config.warpgroups, config.split), []).append(config)
    rounds = itertools.zip_longest(*list(ways.values())[: MOST // 2])
    return [c for turn in rounds for c in turn if c is not None][:MOST]


@functools.cache
def _decode_grid(rows: int) -> tuple[Decode8Config, ...]:
    found = []
    for warpgroups, split, slices, limit in itertools.product(
        (1, 2, 4), (1, 2, 4, 8), (1, 2, 4), (_TWO_BLOCKS, SHARED_MEMORY)
    ):
        fields = {"warpgroups": warpgroups, "split": split, "slices": slices}
        found.append(deepest(Decode8Config, limit, 8, block_m=rows, **fields))
    return tuple(dict.fromkeys(config for config in found if config is not None))


def prefill_configs(p: Problem8) -> list[Prefill8Config]:
    """Candidates for many rows."""
    found = [c for c in _prefill_grid() if c.unsupported(p.dtype) is None]
    return sorted(found, key=lambda c: tuning8.estimate(c, p.m, p.k, p.n))[:MOST]


@functools.cache
def _prefill_grid() -> tuple[Prefill8Config, ...]:
    found = []
    for warpgroups, columns, multicast in itertools.product(
        (1, 2, 3), (64, 128, 192, 256), (None, "x", "w")
    ):
        fields = {"warpgroups": warpgroups, "block_n": columns, "multicast": multicast}
        found.append(deepest(Prefill8Config, SHARED_MEMORY, 6, **fields))
    return tuple(config for config in found if config is not None)


def every_config() -> Iterator[tuple[Problem8, Config8 | W8Config]]:
    """A problem for all that may be chosen, and every value of every field: three formats, and
    sizes that leave remainders.  Of the kernels of the GPU at hand."""
    if family.ampere():
        yield from family.eight_bit_configs()
        return
    few: list[dict[str, Any]] = [{"block_m": b} for b in (8, 16, 32, 64)]
    few += [{"split": s} for s in (2, 4, 8)]
    few += [{"warpgroups": w} for w in (1, 3)] + [{"warpgroups": 4, "slices": 1}]
    few += [{"slices": s, "stages": 2} for s in (1, 3, 4)] + [{"slices": 1, "stages": 7}]
    few += [{"pdl": True}, {"split": 4, "pdl": True}]
    many = [{"warpgroups": w, "block_n": n} for w in (1, 2, 3) for n in (64, 128, 192, 256)]
    many += [{"multicast": m, "stages": s} for m in (None, "x", "w") for s in (2, 3)]
    many += [{"warpgroups": 3, "multicast": m} for m in ("x", "w")]
    for dtype, block in (("int8", False), (FP8, False), (FP8, True)):
        n = 1280 if block else 1216
        own = tuning8.candidates(dtype)
        tried = [*own, *(fits(Decode8Config, **f) for f in few)]
        tried += [fits(Prefill8Config, **f) for f in many]
        for config in dict.fromkeys(tried):
            if isinstance(config, Decode8Config):
                yield Problem8(min(config.block_m, 50) - 1, 4096, n, dtype, block), config
            elif config is not None and config.unsupported(dtype) is None:
                yield Problem8(600, 1024, n, dtype, block), config
