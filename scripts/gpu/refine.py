"""The neighbours of the fastest configs (see `scripts.gpu.tune`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.gpu import candidates, tune
from scripts.gpu.ahead import Ahead
from scripts.gpu.configs import config_of

_ahead: Ahead | None = None


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Neighbours of the best config of every problem that was tuned."""
    tuned = facts.get("tuned", {})
    found = []
    for p in tune.problems():
        if p.key in tuned:
            config = config_of(tuned[p.key]["config"])
            assert config is not None
            found += [tune.candidate(p, c) for c in candidates.refinements(config)]
    return found


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Time one."""
    global _ahead
    if _ahead is None:
        _ahead = Ahead.of(items(facts), tune.build, facts)
    return tune.time_candidate(item, _ahead, facts)
