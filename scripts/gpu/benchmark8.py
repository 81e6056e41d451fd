"""Times of the 8-bit kernels as they choose their own tile sizes, of XLA's 8-bit products with the
same scales, of `jax.nn.scaled_matmul`, of the activations' quantization, and of bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from scripts.gpu import benchmark, family, products, products8, timing
from scripts.gpu.ahead import Ahead
from scripts.gpu.benchmark import FIRST_ROWS, HEADLINE
from scripts.gpu.problems import ROWS, SHAPES, Problem, of_item, to_item
from scripts.gpu.problems8 import FP8, Problem8, of_item8, to_item8

_SCALED_ROWS = (16, 4096)
# Compiled ahead, since Mosaic's part of that holds Python's lock for long.
_MOSAIC = ("kernel", "rows", "whole")

_ahead: Ahead | None = None


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The kernels, XLA and bfloat16 at the headline; quantization; then all rows and shapes; then
    block scales and the other way.  What an earlier section timed in bfloat16 stands."""
    first = [(m, *shape) for shape in HEADLINE for m in FIRST_ROWS]
    every = [(m, *shape) for shape in SHAPES for m in ROWS]
    listed: list[tuple[str, Any]] = []
    for size in first:
        listed += [(way, Problem8(*size, d)) for d in ("int8", FP8) for way in ("kernel", "xla")]
        listed.append(("bf16", Problem(*size)))
    many = [(4096, k, n) for k, n in SHAPES if k == 4096]
    listed += [(way, Problem8(*s, d)) for s in many for d in ("int8", FP8) for way in ("rows",)]
    listed += [("whole", Problem8(*size, "int8")) for size in first]
    for size in every:
        listed += [(way, Problem8(*size, d)) for d in ("int8", FP8) for way in ("kernel", "xla")]
        listed.append(("bf16", Problem(*size)))
    blocks = [Problem8(*size, FP8, block=True) for size in (*first, *every)]
    listed += [(way, p) for p in blocks[: len(first)] for way in ("kernel", "xla", "rows")]
    listed += [("scaled_matmul", p) for p in blocks if p.m in _SCALED_ROWS][: len(first)]
    listed += [("kernel", p) for p in blocks]
    known = facts.get("bf16_us", {})
    wanted = [
        _item(method, p)
        for method, p in dict.fromkeys(listed)
        if method != "bf16" or f"{p.k}x{p.n} m{p.m}" not in known
    ]
    return family.possible(wanted)


def _item(method: str, p: Any) -> dict[str, Any]:
    if method == "bf16":
        return to_item(p, "bf16 ", method=method, rotations=products.rotations(p, method))
    return to_item8(p, f"{method} ", method=method, rotations=products8.rotations(p))


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compile (the kernels' programs: ahead), and time."""
    method = item["method"]
    if method == "bf16":
        p = of_item(item)
        return benchmark.timed(p, method, products.build(p, method), facts)
    p = of_item8(item)
    mosaic = method in _MOSAIC
    program = _programs(facts).get(item["key"]) if mosaic else products8.build(p, method)
    return timed8(p, method, program, facts)


def timed8(p: Problem8, method: str, program: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Time a program of `products8.build`; with the size of its results."""
    triples = _arguments(p, method in ("rows", "whole"))
    calls = 12 if p.m <= 128 else 6
    told = timing.measure(program, [triples], len(triples), facts.get("timer", "wall"), calls)
    rms = products8.spread(program(triples)[0])
    size = {"m": p.m, "k": p.k, "n": p.n, "dtype": p.dtype, "block": p.block}
    return {**told, "method": method, **size, "rms": rms}


@functools.lru_cache(maxsize=1)
def _arguments(p: Problem8, unquantized: bool) -> list[Any]:
    return products8.arguments(p, "whole" if unquantized else "kernel")


def _programs(facts: Mapping[str, Any]) -> Ahead:
    global _ahead
    if _ahead is None:
        own = [i for i in items(facts) if i["method"] in _MOSAIC]
        _ahead = Ahead.of(own, lambda i: products8.build(of_item8(i), i["method"]), facts)
    return _ahead
