"""Which tile sizes of the 8-bit kernels are tried (see `candidates`)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
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
    return list(dict.fromkeys([choice, *few, *many]))


def decode_configs(p: Problem8) -> list[Config8]:
    """Candidates for few rows, those first that the estimate puts first; with two blocks on each
    multiprocessor, or one with deep buffers."""
    # A last block without inputs only waits.
    found = [c for c in _decode_grid(min(64, block_m(p.m))) if p.k > 128 * c.slices * c.split]
    return _most_promising(p, found)


@functools.cache
def _decode_grid(rows: int) -> tuple[Decode8Config, ...]:
    found = []
    for warpgroups, split, slices, limit in itertools.product(
        (1, 2, 4), (1, 2, 4, 8), (1, 2, 4), (_TWO_BLOCKS, SHARED_MEMORY)
    ):
        fields = {"warpgroups": warpgroups, "split": split, "slices": slices}
        found.append(deepest(Decode8Config, limit, 8, block_m=rows, **fields))
    return tuple(dict.fromkeys(config for config in found if config is not None))


def prefill_configs(p: Problem8) -> list[Config8]:
    """Candidates for many rows."""
    return _most_promising(p, [c for c in _prefill_grid() if c.unsupported(p.dtype) is None])


@functools.cache
def _prefill_grid() -> tuple[Prefill8Config, ...]:
    found = []
    for warpgroups, columns, multicast in itertools.product(
        (1, 2, 3), (64, 128, 192, 256), (None, "x", "w")
    ):
        fields = {"warpgroups": warpgroups, "block_n": columns, "multicast": multicast}
        found.append(deepest(Prefill8Config, SHARED_MEMORY, 6, **fields))
    return tuple(config for config in found if config is not None)


def _most_promising(p: Problem8, found: Sequence[Config8]) -> list[Config8]:
    return sorted(found, key=lambda c: tuning8.estimate(c, p.m, p.k, p.n))[:MOST]


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
