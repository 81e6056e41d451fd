"""One process of `scripts/gpu_check.py`: runs the items of one section and writes down each result.

A section is a module with

    items(facts) -> list of JSON objects, each with a "key" of its own, most valuable first
    run(item, facts) -> JSON object

`facts` is what is known so far (`scripts.gpu.runner`).  Every event is one line of JSON in the
journal, written at once: what a crash or a kill leaves behind is everything up to the item that
did it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file: find scripts.* and jq

UNHEALTHY = 3  # exit code: the device answers no more, a fresh process may go on


class Journal:
    """Lines of JSON, each written whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **fields: Any) -> None:
        """Append one event."""
        line = json.dumps({"event": event, "time": time.time(), **fields}, default=_plain)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _plain(value: Any) -> Any:
    """What JSON has no word for: NumPy's numbers as numbers, the rest as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else str(value)


def work(
    section: Any, facts: Mapping[str, Any], journal: Journal, deadline: float, part: tuple[int, int]
) -> int:
    """Run the items of a section that are this process's, and not done yet; returns its exit code.

    Args:
      section: the module.
      facts: with "done", the keys to leave out.
      journal: where events go.
      deadline: no item starts after this (time.time()).
      part: (i, n): every n-th item from the i-th.
    """
    try:
        items = list(section.items(facts))
        keys = [item["key"] for item in items]
        if len(set(keys)) != len(keys):
            raise ValueError(
                f"keys of items repeat: {sorted(k for k in keys if keys.count(k) > 1)}"
            )
    except Exception:
        journal.write("broken", traceback=traceback.format_exc())
        return 1
    journal.write("plan", items=keys)
    done = set(facts.get("done", ()))
    for item in [item for item in items if item["key"] not in done][part[0] :: part[1]]:
        if time.time() > deadline:
            break
        journal.write("start", item=item["key"])
        start = time.perf_counter()
        try:
            result = section.run(item, facts)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"[:2000]
            trace = traceback.format_exc()[-6000:]
            journal.write("error", item=item["key"], error=message, traceback=trace)
            if not healthy():
                return UNHEALTHY
            continue
        seconds = round(time.perf_counter() - start, 3)
        journal.write("done", item=item["key"], result=result, seconds=seconds)
    return 0


def healthy() -> bool:
    """Whether the device still computes: after a fault in a kernel it refuses everything."""
    jax = sys.modules.get("jax")
    if jax is None:
        return True
    try:
        return int(jax.block_until_ready(jax.numpy.arange(3) + 1)[2]) == 3
    except Exception:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1))
    args = parser.parse_args(arguments)
    journal = Journal(args.journal)
    try:
        facts = json.loads(args.facts.read_text(encoding="utf-8"))
        section = importlib.import_module(args.module)
    except Exception:
        journal.write("broken", traceback=traceback.format_exc())
        return 1
    return work(section, facts, journal, args.deadline, tuple(args.part))


if __name__ == "__main__":
    sys.exit(main())
