"""What scripts report: a table that grows row by row, the same rows as files, and a plot.

with GrowingTable([Column("method", 20, "l"), Column("perplexity", 12)]) as table:
    table.status("quantizing")          # a line below the table, on a terminal only
    table.add(["rtn", "12.3"])
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jq.compare.report.svg import spread

# Okabe and Ito's colours, told apart by colour-blind readers too, and a marker for each.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its header, the width plain lines give it, and the side it is aligned to."""

    header: str
    width: int
    side: Literal["l", "r"] = "r"


class GrowingTable:
    """A table on stdout that shows each row as soon as it is there.

    On a terminal `rich` draws it, with a status line below; anywhere else rows are plain lines.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = tuple(columns)
        self._rows: list[tuple[str, ...]] = []
        self._live: Any = None

    def __enter__(self) -> GrowingTable:
        """Show the headers."""
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4)
            self._live.start()
            self._draw("")
        else:
            self._print([column.header for column in self._columns])
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._draw("")
            self._live.stop()

    def add(self, cells: Sequence[str]) -> None:
        """Show one more row."""
        self._rows.append(tuple(cells))
        if self._live is None:
            self._print(cells)
        else:
            self._draw("")

    def status(self, text: str) -> None:
        """Say what is going on; nothing where there is no terminal."""
        if self._live is not None:
            self._draw(text)

    def _print(self, cells: Sequence[str]) -> None:
        padded = [
            cell.rjust(column.width) if column.side == "r" else cell.ljust(column.width)
            for cell, column in zip(cells, self._columns, strict=True)
        ]
        print("  ".join(padded).rstrip(), flush=True)

    def _draw(self, status: str) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in self._columns:
            justify = "right" if column.side == "r" else "left"
            table.add_column(column.header, justify=justify, no_wrap=True)
        for row in self._rows:
            table.add_row(*map(Text, row))
        self._live.update(Group(table, Text(status, style="dim")))


def markdown_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, aligned for readers of the file as well."""
    lines = [tuple(column.header for column in columns), *map(tuple, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    rule = tuple(
        "-" * (width - 1) + ("-" if column.side == "l" else ":")
        for column, width in zip(columns, widths, strict=True)
    )
    padded = [
        [
            cell.ljust(width) if column.side == "l" else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mappings of equal keys, as lines below one of the keys; None is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; ValueError for NaN and infinity, for which JSON has no number."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Point:
    """A marker of a plot; points of one series look alike, `error` is the standard error of y."""

    series: str
    x: float
    y: float
    error: float = 0.0


def plot_bits(
    path: Path,
    points: Sequence[Point],
    *,
    line: tuple[float, str],
    title: str,
    ylabel: str,
    note: str = "",
) -> None:
    """Quality against bits per weight, as a PNG of about 50 kB.

    Args:
      path: the file.
      points: x in bits per weight; each is labelled with its series.
      line: y and label of a horizontal line, the model before quantization.
      title, ylabel, note: texts; the note stands below the axes.
    Raises: RuntimeError, with the way out, without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install matplotlib") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(8.4, 4.8), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw_points(axes, points, line)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_ylabel(ylabel)
        axes.set_xlabel(f"bits per weight of the linears (log scale){note and chr(10) + note}")
        figure.savefig(path, metadata={"Software": None})


def _draw_points(axes: Any, points: Sequence[Point], line: tuple[float, str]) -> None:
    low = min(line[0], *(p.y - p.error for p in points))
    high = max(line[0], *(p.y + p.error for p in points))
    span = (high - low) or 1.0
    axes.set_ylim(low - 0.1 * span, high + 0.08 * span)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.85, 12.5)
    ticks = [3, 4, 5, 6, 8, 12]
    axes.set_xticks(ticks, labels=[str(t) for t in ticks])
    axes.minorticks_off()
    axes.spines["right"].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", zorder=0)
    axes.axhline(line[0], color="#666666", linestyle="--", linewidth=1, zorder=1)
    # Where no cluster has its labels: between 4 and 8 bits.
    axes.text(7.6, line[0] - 0.012 * span, line[1], color="#444444", ha="right", va="top")
    names = list(dict.fromkeys(p.series for p in points))
    style = {name: (_COLOURS[i % 7], _MARKERS[i % 7]) for i, name in enumerate(names)}
    for cluster in _clusters(points):
        heights = spread([p.y for p in cluster], 0.05 * span)
        places = _side_by_side(cluster)
        for p, x, height in zip(cluster, places, heights, strict=True):
            colour, marker = style[p.series]
            axes.errorbar(x, p.y, p.error, color=colour, marker=marker, capsize=2, zorder=3)
            axes.annotate(
                p.series,
                (x, p.y),
                (max(places) * 1.04, height),
                color=colour,
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6},
                zorder=2,
            )


def _clusters(points: Sequence[Point]) -> list[list[Point]]:
    """Points whose x values are less than 10 % apart, each cluster from the lowest up."""
    clusters: list[list[Point]] = []
    for p in sorted(points, key=lambda p: p.x):
        if clusters and p.x < clusters[-1][-1].x * 1.1:
            clusters[-1].append(p)
        else:
            clusters.append([p])
    return [sorted(cluster, key=lambda p: p.y) for cluster in clusters]


def _side_by_side(cluster: Sequence[Point]) -> list[float]:
    """Where to draw points: those of equal x 1.5 % apart, so that no bar hides another."""
    places: list[float] = []
    for p in cluster:
        equal = sum(math.isclose(p.x, other.x, rel_tol=0.002) for other in cluster)
        before = sum(math.isclose(p.x, other.x, rel_tol=0.002) for other in cluster[: len(places)])
        places.append(p.x * 1.015 ** (before - (equal - 1) / 2))
    return places
