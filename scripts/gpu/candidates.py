"""Which tile sizes are tried: to find the fastest, and to see each of them compute rightly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from jq.pallas_kernels import tuning
from jq.pallas_kernels.ampere.config import W4Config
from jq.pallas_kernels.compat import CORES
from jq.pallas_kernels.config import SHARED_MEMORY, DecodeConfig, PrefillConfig
from scripts.gpu import family
from scripts.gpu.problems import Problem

# (K, N, group): a single tile, sizes that no block divides, a long K.
ODD_SIZES = (
    (64, 64, 64),
    (192, 192, 64),
    (320, 448, 32),
    (1088, 576, -1),
    (4160, 320, 32),
    (12800, 128, 128),
)
MOST = 10
_TWO_BLOCKS = SHARED_MEMORY // 2 - 2048


def block_m(m: int) -> int:
    """Rows per block of a decode kernel for m rows; 64 are the most."""
    return next((b for b in (8, 16, 32) if m <= b), 64)


def fits(kind: type, **fields: Any) -> Any:
    """The config, or None where it breaks a rule of its own."""
    try:
        return kind(**fields)
    except ValueError:
        return None


def deepest(kind: type, limit: int, most: int, step: int = 1, **fields: Any) -> Any:
    """The config with the most stages, up to `most`, whose shared memory stays below a limit."""
    for stages in range(most - most % step, 1, -step):
        config = fits(kind, stages=stages, **fields)
        if config is not None and config.shared_bytes() + 1024 <= limit:
            return config
    return None


def decode_configs(p: Problem) -> list[DecodeConfig]:
    """Candidates for a problem of few rows, the most promising first.

    Blocks should fill the multiprocessors evenly, and bytes in flight should be many: with two
    blocks on each of them, or one with deep buffers.
    """
    found = []
    for (wgs, tiles), split, limit in itertools.product(
        ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2)), (1, 2, 4, 8), (_TWO_BLOCKS, SHARED_MEMORY)
    ):
        config = deepest(
            DecodeConfig,
            limit,
            8,
            block_m=block_m(p.m),
            slices=4,
            warpgroups=wgs,
            tiles=tiles,
            split=split,
        )
        if config is None or (limit == SHARED_MEMORY and config in (c for _, c in found)):
            continue
        steps = math.ceil(p.k / (256 * split))
        if steps < 2:
            continue
        found.append((_waste(p, config, 2 if limit == _TWO_BLOCKS else 1), config))
    order = sorted(range(len(found)), key=lambda i: found[i][0])
    return [found[i][1] for i in order][:MOST]


def _waste(p: Problem, config: DecodeConfig, resident: int) -> float:
    """Time lost to a last, partly filled wave of blocks, and to reading x once per block."""
    blocks = math.ceil(p.n / config.block_n) * config.split * math.ceil(p.m / config.block_m)
    places = CORES * resident
    waves = blocks / places
    # Below one wave the idle places are lost; short kernels mind the last wave most.
    idle = math.ceil(waves) / waves - 1
    x_bytes = 2 * min(p.m, config.block_m) / (config.block_n / 2)
    return idle + 0.3 * x_bytes + 0.05 * (config.split - 1)


def refinements(best: DecodeConfig | PrefillConfig) -> list[DecodeConfig | PrefillConfig]:
    """Neighbours of the fastest config."""
    if isinstance(best, DecodeConfig):
        base = {n: getattr(best, n) for n in ("block_m", "warpgroups", "tiles", "split")}
        inputs = best.slices * best.stages
        tried = [fits(DecodeConfig, **base, slices=best.slices, stages=best.stages, pdl=True)]
        tried += [fits(DecodeConfig, **base, slices=s, stages=max(2, inputs // s)) for s in (2, 3)]
        tried += [fits(DecodeConfig, **base, slices=best.slices, stages=best.stages - 1)]
    else:
        tried = [
            fits(PrefillConfig, block_m=best.block_m, stages=best.stages, multicast=mc, snake=snake)
            for mc, snake in ((best.multicast, 4), (best.multicast, 16), (not best.multicast, 16))
        ]
    return [config for config in tried if config is not None and config != best]


def prefill_configs(p: Problem) -> list[PrefillConfig]:
    """Candidates for a problem of many rows."""
    rows = [b for b in (256, 128, 64) if b <= max(64, 2 * p.m)]
    found = []
    for size, multicast in itertools.product(rows, (False, True)):
        deep = deepest(PrefillConfig, SHARED_MEMORY, 8, 2, block_m=size, multicast=multicast)
        shallow = fits(PrefillConfig, block_m=size, stages=4, multicast=multicast)
        found += [c for c in dict.fromkeys((deep, shallow)) if c is not None]
    return found


def configs(p: Problem) -> list[DecodeConfig | PrefillConfig]:
    """Candidates, the kernels' own choice first; of both kernels where either may win."""
    choice = tuning.choose(p.m, p.k, p.n, **p.format)
    few: list[Any] = decode_configs(p) if p.m <= 256 else []
    many: list[Any] = prefill_configs(p) if p.m > 32 else []
    return list(dict.fromkeys([choice, *few, *many]))


def every_config() -> Iterator[tuple[Problem, DecodeConfig | PrefillConfig | W4Config]]:
    """A problem for all that may be chosen, and every value of every field: two formats, and sizes
    that leave remainders.  Of the kernels of the GPU at hand."""
    if family.ampere():
        yield from family.int4_configs()
        return
    fields = [{"block_m": b} for b in (8, 16, 32, 64)]
    fields += [{"split": s} for s in (2, 4, 8)]
    fields += [{"warpgroups": w, "tiles": t} for w, t in ((1, 1), (3, 1), (1, 2), (2, 2))]
    fields += [{"slices": 2}, {"slices": 3}, {"stages": 2}, {"stages": 7}, {"pdl": True}]
    fields += [{"split": 4, "tiles": 2, "pdl": True}, {"split": 8, "block_m": 64, "stages": 2}]
    for group, symmetric in ((128, True), (32, False)):
        own = [c for c in tuning.CANDIDATES if isinstance(c, DecodeConfig)]
        for config in dict.fromkeys([*own, *(fits(DecodeConfig, **field) for field in fields)]):
            if config is not None:
                yield Problem(min(config.block_m, 50) - 1, 4096, 1216, group, symmetric), config
    prefill = [{"block_m": b, "multicast": m} for b in (64, 128, 256) for m in (False, True)]
    prefill += [{"stages": 2}, {"block_m": 64, "stages": 8}]
    for group, symmetric in ((128, True), (32, False)):
        own = [c for c in tuning.CANDIDATES if isinstance(c, PrefillConfig)]
        for config in dict.fromkeys([*own, *(fits(PrefillConfig, **field) for field in prefill)]):
            if config is not None:
                yield Problem(600, 1024, 1216, group, symmetric), config
