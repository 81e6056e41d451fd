"""Goals, and the arithmetic of the tables on what may not have been measured."""

from __future__ import annotations

from typing import Any


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b; None where either is unknown."""
    return a / b if a and b else None


def goal(goal: str, place: str, needed: float, got: float | None) -> dict[str, Any]:
    """One goal at one place: "met" is None where it was not measured."""
    met = None if got is None else got >= needed
    return {"goal": goal, "place": place, "needed": needed, "got": got, "met": met}
