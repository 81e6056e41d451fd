"""The time of every candidate of tile sizes, for each shape and number of rows.

A candidate is an item of its own: one that hangs costs no other.  `best` picks the fastest;
`scripts.gpu.refine` then tries its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from scripts.gpu import benchmark, candidates, products
from scripts.gpu.ahead import Ahead
from scripts.gpu.configs import config_json, config_of
from scripts.gpu.goals import plausible
from scripts.gpu.problems import SHAPES, Problem, of_item, to_item

# One of each kind first: a table with holes still guides the heuristic.
FIRST = (
    (16, 4096, 14336),
    (1, 4096, 4096),
    (64, 4096, 14336),
    (4096, 4096, 14336),
    (16, 14336, 4096),
    (16, 8192, 28672),
    (128, 4096, 14336),
    (512, 4096, 14336),
    (16, 4096, 4096),
)
ROWS = (16, 1, 64, 4096, 32, 128, 512, 8)

_TOLD = ("us", "us_wall", "config", "m", "k", "n", "dtype", "block")
_ahead: Ahead | None = None


def problems() -> list[Problem]:
    """Those to tune, one of each kind first."""
    every = ((m, *shape) for m in ROWS for shape in SHAPES)
    return [Problem(*sizes) for sizes in dict.fromkeys((*FIRST, *every))]


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every candidate of every problem."""
    return [candidate(p, c) for p in problems() for c in candidates.configs(p)]


def candidate(p: Problem, config: Any) -> dict[str, Any]:
    """The item of a config."""
    return to_item(p, f"{config.name} ", config=config_json(config))


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Time one."""
    global _ahead
    if _ahead is None:
        _ahead = Ahead.of(items(facts), build, facts)
    return time_candidate(item, _ahead, facts)


def build(item: Mapping[str, Any]) -> Any:
    """The program of one."""
    return products.build(of_item(item), "w4", config_of(item["config"]))


def time_candidate(
    item: Mapping[str, Any], programs: Ahead, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The time of one config, beside what it is of."""
    p = of_item(item)
    told = benchmark.timed(p, "w4", programs.get(item["key"]), facts)
    told.pop("kernels", None)
    return {**told, "problem": p.key, "config": item["config"]}


def table_rows(
    tuned: Mapping[str, Mapping[str, Any]], xla: Mapping[tuple[int, int, int], float]
) -> list[dict[str, Any]]:
    """What `best` found, as `jq.pallas_kernels.tuning.table` takes it.

    xla: (k, n, m) -> microseconds of dequantizing and multiplying with XLA, where it was timed; a
    product for which that was the fastest is left to it.
    """
    rows = []
    for entry in tuned.values():
        p = Problem(entry["m"], entry["k"], entry["n"])
        rows.append(table_row(p, entry, xla.get((p.k, p.n, p.m))))
    return rows


def table_row(p: Any, entry: Mapping[str, Any], xla_us: float | None) -> dict[str, Any]:
    """Of a problem: its size and format, and the kernel with its config; XLA's where that won."""
    row = {"k": p.k, "n": p.n, "m": p.m, **p.format}
    if xla_us is not None and xla_us < entry["us"]:
        return {**row, "kernel": "reference"}
    config = {name: value for name, value in entry["config"].items() if name != "kind"}
    return {**row, "kernel": entry["config"]["kind"], "config": config}


def best(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By problem: the fastest config whose results had the right size, its time, and how many
    configs it was the fastest of."""
    found: dict[str, dict[str, Any]] = {}
    for result in filter(plausible, results):
        entry = found.setdefault(result["problem"], {"us": float("inf"), "of": 0})
        entry["of"] += 1
        if result["us"] < entry["us"]:
            entry |= {name: result[name] for name in _TOLD if name in result}
    return found
