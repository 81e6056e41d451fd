"""How long a compiled program keeps the GPU busy.

Two clocks.  "cupti": the driver's own record of every kernel, through Mosaic GPU's profiler; its
sum is the time the GPU works for the program.  "wall": the host's clock around many calls, which
also sees gaps between kernels and whatever the host is too slow for.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax

_WALL_S = 0.05


def measure(
    program: Any, args: Sequence[Any], products: int, timer: str, iterations: int = 12
) -> dict[str, Any]:
    """Time per product of a compiled program that computes several.

    Args:
      program: compiled, or jitted; called as program(*args).
      args: its arguments.
      products: how many it computes, with different weights.
      timer: "cupti" or "wall".
      iterations: timed calls of it; the median is given.
    Returns: "us" (by the timer), "us_min", "us_wall", "timer", and with cupti "kernels": by name,
      launches per product and microseconds per launch.
    """
    for _ in range(2):
        jax.block_until_ready(program(*args))
    wall = wall_us(program, args) / products
    told: dict[str, Any] = {"us": wall, "us_min": wall, "us_wall": wall, "timer": "wall"}
    if timer != "cupti":
        return told
    calls = cupti_calls(program, args, iterations)
    if not calls:
        return {**told, "note": "cupti saw no kernel"}
    per_call = [sum(us for _, us in call) / products for call in calls]
    return {
        **told,
        "us": statistics.median(per_call),
        "us_min": min(per_call),
        "timer": "cupti",
        "kernels": by_kernel(calls, products),
    }


def cupti_calls(program: Any, args: Sequence[Any], calls: int) -> list[list[tuple[str, float]]]:
    """(name, microseconds) of each kernel of each call; [] where none was seen."""
    from jax.experimental.mosaic.gpu import profiler

    calls = max(calls, 2)  # for one, the profiler returns another shape
    measured = profiler.measure(program, aggregate=False, iterations=calls)
    _, timings = measured(*args)
    return [[(name, 1e3 * ms) for name, ms in call] for call in timings or []]


def by_kernel(
    calls: Sequence[Sequence[tuple[str, float]]], products: int
) -> dict[str, dict[str, float]]:
    """Launches per product and median microseconds of each kernel, the costliest first."""
    times = defaultdict(list)
    for call in calls:
        for name, us in call:
            times[name[:80]].append(us)
    order = sorted(times, key=lambda name: -sum(times[name]))
    launches = len(calls) * products
    return {
        name: {
            "launches": round(len(times[name]) / launches, 3),
            "us": round(statistics.median(times[name]), 3),
        }
        for name in order[:6]
    }


def wall_us(program: Any, args: Sequence[Any]) -> float:
    """Microseconds per call in a row of calls: the slope between a few and three times as many.

    Where others disturb the machine so much that more calls take less time, the mean of those.
    """
    once = max(_seconds(program, args, 1), 1e-6)
    few = max(2, min(100, round(_WALL_S / once)))
    short = statistics.median(_seconds(program, args, few) for _ in range(3))
    long = statistics.median(_seconds(program, args, 3 * few) for _ in range(3))
    if long <= short:
        return 1e6 * long / (3 * few)
    return 1e6 * (long - short) / (2 * few)


def _seconds(program: Any, args: Sequence[Any], calls: int) -> float:
    start = time.perf_counter()
    out = None
    for _ in range(calls):
        out = program(*args)
    jax.block_until_ready(out)
    return time.perf_counter() - start
