"""Times of the kernel as it chooses its own tile sizes, of XLA's bfloat16 product, and of XLA's
dequantize-then-dot."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from scripts.gpu import products, timing
from scripts.gpu.ahead import Ahead
from scripts.gpu.problems import ROWS, SHAPES, Problem, of_item, to_item

# Those the goals are stated for, first.
HEADLINE = ((4096, 14336), (4096, 4096), (8192, 28672))
FIRST_ROWS = (1, 16, 64, 4096)
_DEQUANTIZED_ROWS = (1, 16, 64, 512, 4096)

_ahead: Ahead | None = None


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The kernel and bfloat16 at the headline; then all rows and shapes; then the other way."""
    first = [Problem(m, *shape) for shape in HEADLINE for m in FIRST_ROWS]
    every = [Problem(m, *shape) for shape in (*HEADLINE, *SHAPES) for m in ROWS]
    slow = [Problem(m, *HEADLINE[0]) for m in _DEQUANTIZED_ROWS]
    slow += [Problem(m, *shape) for shape in HEADLINE[1:] for m in (1, 16, 4096)]
    listed = [(m, p) for p in first for m in ("w4", "bf16")]
    listed += [("dequantize", p) for p in slow[:3]]
    listed += [(m, p) for p in every for m in ("w4", "bf16")]
    listed += [("dequantize", p) for p in [*slow, *every]]
    return [
        to_item(p, f"{method} ", method=method, rotations=products.rotations(p, method))
        for method, p in dict.fromkeys(listed)
    ]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compile (the kernel's programs: ahead), and time."""
    p, method = of_item(item), item["method"]
    program = _programs(facts).get(item["key"]) if method == "w4" else products.build(p, method)
    return timed(p, method, program, facts)


def timed(p: Problem, method: str, program: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Time a program of `products.build`; with the bytes and the size of its results."""
    pairs = _arguments(p, method)
    told = timing.measure(program, [pairs], len(pairs), facts.get("timer", "wall"), _calls(p))
    rms = products.spread(program(pairs)[0])
    return {**told, "method": method, "m": p.m, "k": p.k, "n": p.n, "rms": rms}


@functools.lru_cache(maxsize=1)
def _arguments(p: Problem, method: str) -> list[Any]:
    return products.arguments(p, method)


def _calls(p: Problem) -> int:
    return 12 if p.m <= 128 else 6


def _programs(facts: Mapping[str, Any]) -> Ahead:
    global _ahead
    if _ahead is None:
        own = [i for i in items(facts) if i["method"] == "w4"]
        _ahead = Ahead.of(own, lambda i: products.build(of_item(i), "w4"), facts)
    return _ahead
