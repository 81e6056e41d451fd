"""The time of every candidate of tile sizes of the 8-bit kernels (see `tune`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.gpu import benchmark8, candidates8, products8, tune
from scripts.gpu.ahead import Ahead
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.problems8 import FP8, Problem8, of_item8, to_item8

_ahead: Ahead | None = None


def problems() -> list[Problem8]:
    """Those to tune, one of each kind first."""
    return [Problem8(p.m, p.k, p.n, dtype) for p in tune.problems() for dtype in ("int8", FP8)]


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every candidate of every problem."""
    return [
        to_item8(p, f"{c.name} ", config=config_json(c))
        for p in problems()
        for c in candidates8.configs(p)
    ]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Time one."""
    global _ahead
    if _ahead is None:
        _ahead = Ahead.of(items(facts), _build, facts)
    p = of_item8(item)
    told = benchmark8.timed8(p, "kernel", _ahead.get(item["key"]), facts)
    told.pop("kernels", None)
    return {**told, "problem": p.key, "config": item["config"]}


def _build(item: Mapping[str, Any]) -> Any:
    return products8.build(of_item8(item), "kernel", config_of(item["config"]))


def table_rows(
    tuned: Mapping[str, Mapping[str, Any]], xla: Mapping[tuple[Any, ...], float]
) -> list[dict[str, Any]]:
    """What `tune.best` found, as `jq.pallas_kernels.tuning8.table` takes it.

    xla: (k, n, m, dtype, block) -> microseconds of XLA's product, where it was timed; a product for
      which that was the fastest is left to it.
    """
    rows = []
    for entry in tuned.values():
        p = Problem8(*(entry[name] for name in ("m", "k", "n", "dtype", "block")))
        rows.append(tune.table_row(p, entry, xla.get((p.k, p.n, p.m, p.dtype, p.block))))
    return rows
