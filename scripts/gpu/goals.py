"""Goals, and the arithmetic of the tables on what may not have been measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.gpu.problems import Problem
from scripts.gpu.problems8 import Problem8


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b; None where either is unknown."""
    return a / b if a and b else None


def plausible(result: Mapping[str, Any]) -> bool:
    """Whether results had the size they must have: a kernel that skips work is fast, too."""
    return 0.5 < result["rms"] < 2.5


def goal(goal: str, place: str, needed: float, got: float | None) -> dict[str, Any]:
    """One goal at one place: "met" is None where it was not measured."""
    met = None if got is None else got >= needed
    return {"goal": goal, "place": place, "needed": needed, "got": got, "met": met}


def all_correct(name: str, section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goal that each variant of a section is right; none where nothing was tried."""
    results, errors = section.get("results", {}), section.get("errors", {})
    if not results and not errors:
        return []
    right = sum(r["ok"] for r in results.values()) / (len(results) + len(errors))
    return [goal(name, "everywhere", 1.0, right)]


def ideal_us(p: Problem | Problem8, facts: Mapping[str, Any], speed: int = 1) -> float | None:
    """The longer of moving the bytes at the copy bandwidth and multiplying at `speed` times the
    matrix rate of bfloat16."""
    if not facts.get("copy_gbs") or not facts.get("bf16_tflops"):
        return None
    moving = p.moved_bytes() / 1e3 / facts["copy_gbs"]
    return max(moving, p.flops / 1e6 / (speed * facts["bf16_tflops"]))
