"""Compiling the next programs while one is timed.

Kernels take seconds to compile and microseconds to run, and compiling keeps the device free.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_WINDOW = 12


class Ahead:
    """Programs by key, compiled by threads some places ahead of the one that is asked for."""

    def __init__(self, builds: Mapping[str, Callable[[], Any]], threads: int | None = None) -> None:
        self._waiting = dict(builds)  # in the order in which they will be asked for
        self._started: dict[str, Future[Any]] = {}
        cores = os.cpu_count() or 2
        self._pool = ThreadPoolExecutor(threads or max(1, min(6, cores // 2)))

    @classmethod
    def of(
        cls,
        items: Iterable[Mapping[str, Any]],
        build: Callable[[Mapping[str, Any]], Any],
        facts: Mapping[str, Any],
    ) -> Ahead:
        """Those of a section's items that are not done yet."""
        done = set(facts.get("done", ()))
        return cls({i["key"]: functools.partial(build, i) for i in items if i["key"] not in done})

    def get(self, key: str) -> Any:
        """The program, once; raises what its compilation raised."""
        self._start(key)
        for later in list(self._waiting)[: _WINDOW - len(self._started)]:
            self._start(later)
        # Not kept: programs hold device memory.
        return self._started.pop(key).result()

    def _start(self, key: str) -> None:
        if key in self._waiting:
            self._started[key] = self._pool.submit(self._waiting.pop(key))
