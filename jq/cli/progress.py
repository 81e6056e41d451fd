"""Progress on stderr: a bar on a terminal, lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

from jq.cli.output import time_text


class Meter:
    """Shows how far a long run is.

    Args:
      title: what runs.
      every: seconds between two lines where there is no terminal; the last one always comes.
    """

    def __init__(self, title: str, every: float = 0.0) -> None:
        self._title, self._every = title, every
        self._start = self._last = time.perf_counter()
        self._bar: Any = None

    def __enter__(self) -> Meter:
        """Draw the bar, if there is a terminal."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn(self._title),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, text="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps are behind us."""
        now = time.perf_counter()
        seconds = now - self._start
        left = seconds / max(done, 1) * (total - done)
        text = f"{text}  elapsed {time_text(seconds)}, left {time_text(left)}".strip()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif done == total or now - self._last >= self._every:
            self._last = now
            print(f"{self._title} {done}/{total}  {text}", file=sys.stderr, flush=True)
