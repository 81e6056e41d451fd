"""What the commands print: lines on stderr, tables and JSON on stdout.

On a terminal `rich` draws; anywhere else lines are plain, and a table is columns and spaces.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def complain(message: str) -> None:
    """An error, in one line."""
    _tell(f"jaxq: error: {message}")


def warn(message: str) -> None:
    """Something the user should know."""
    _tell(f"jaxq: warning: {message}")


def note(message: str) -> None:
    """Something the user may want to know."""
    _tell(f"jaxq: note: {message}")


def _tell(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Indented JSON; NaN and infinity, for which JSON has no number, become null."""
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> None:
    """A table; align has a letter per column, "l" or "r"."""
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    if sys.stdout.isatty():
        _print_rich(headers, rows, align, sum(widths) + 2 * len(widths))
        return
    for line in lines:
        cells = zip(line, widths, align, strict=True)
        padded = [c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in cells]
        print("  ".join(padded).rstrip())


def _print_rich(
    headers: Sequence[str], rows: Sequence[Sequence[str]], align: str, width: int
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header, side in zip(headers, align, strict=True):
        table.add_column(header, justify="right" if side == "r" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    # A line too long for the terminal wraps there; rich would cut the cells.
    console.width = max(console.width, width)
    console.print(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Lines of a name and a value."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        print(f"{name:{width}}  {value}")


def size_text(count: float) -> str:
    """Bytes for people: "3.2 MB" (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_text(seconds: float) -> str:
    """ "1:02" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
