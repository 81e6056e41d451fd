"""The error of every linear as a map: layers from left to right, linears from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# From small errors to large: the anchors of viridis, which also reads in grey.
_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_NAMES, _CELL = 78, 16
_WHAT = {"output_error": "outputs", "weight_error": "weights"}


def heatmaps(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, str]]:
    """(arm, what its colours mean, SVG) for every arm with errors.

    arms: name -> linears as a run reports them; the error shown is that of a linear's output, or
      of its weights for an arm that saw no data. Either kind has one colour scale for all arms.
    """
    ranges = _ranges(arms)
    kinds = {name: _kind(linears) for name, linears in arms.items() if linears}
    return [
        (name, f"relative error of {_WHAT[kind]}", _map(arms[name], kind, *ranges[kind]))
        for name, kind in kinds.items()
        if kind in ranges
    ]


def legends(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The colour scales of `heatmaps`, as SVG."""
    return [_legend(_WHAT[kind], *found) for kind, found in _ranges(arms).items()]


def _ranges(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, tuple[float, float]]:
    """Smallest and largest error of each kind that there is."""
    values: dict[str, list[float]] = {}
    for linears in arms.values():
        if linears:
            kind = _kind(linears)
            values.setdefault(kind, []).extend(x[kind] for x in linears if x[kind])
    return {kind: (min(found), max(found)) for kind, found in values.items() if found}


def _legend(what: str, low: float, high: float) -> str:
    cells = "".join(
        f'<rect x="{_NAMES + 4 * i}" y="2" width="4.2" height="12" fill="{colour(i / 49)}"/>'
        for i in range(50)
    )
    return (
        f'<svg viewBox="0 0 460 18" class="legend" role="img" aria-label="colour scale, {what}" '
        f'xmlns="http://www.w3.org/2000/svg">{cells}'
        f'<text x="{_NAMES - 6}" y="12" text-anchor="end" class="soft">{low:.2g}</text>'
        f'<text x="{_NAMES + 208}" y="12" class="soft">{high:.2g}, {what} (log scale)</text></svg>'
    )


def colour(share: float) -> str:
    """Of the scale at `share` in [0, 1]."""
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    i = min(int(place), len(_STOPS) - 2)
    mixed = (a + (place - i) * (b - a) for a, b in zip(_STOPS[i], _STOPS[i + 1], strict=True))
    return "#" + "".join(f"{round(x):02x}" for x in mixed)


def _kind(linears: Sequence[Mapping[str, Any]]) -> str:
    known = all(linear["output_error"] is not None for linear in linears)
    return "output_error" if known else "weight_error"


def _map(linears: Sequence[Mapping[str, Any]], kind: str, low: float, high: float) -> str:
    blocks = list(dict.fromkeys(x["path"].partition("/")[0] for x in linears))
    rows = list(dict.fromkeys(x["path"].rpartition("/")[2] for x in linears))
    width = max(6.0, min(_CELL * 1.6, 520 / len(blocks)))
    parts = []
    for x in linears:
        column = blocks.index(x["path"].partition("/")[0])
        row = rows.index(x["path"].rpartition("/")[2])
        share = _share(x[kind], low, high)
        parts.append(
            f'<rect x="{_NAMES + column * width:.1f}" y="{row * _CELL}" '
            f'width="{width - 1:.1f}" height="{_CELL - 1}" fill="{colour(share)}">'
            f"<title>{escape(x['path'])}: {x[kind]:.4g}</title></rect>"
        )
    for i, name in enumerate(rows):
        parts.append(
            f'<text x="{_NAMES - 6}" y="{i * _CELL + 12}" text-anchor="end" class="soft">'
            f"{escape(name)}</text>"
        )
    bottom = len(rows) * _CELL
    step = max(1, math.ceil(len(blocks) / 16))
    for i in range(0, len(blocks), step):
        text = blocks[i].rpartition("_")[2]
        parts.append(
            f'<text x="{_NAMES + (i + 0.5) * width:.1f}" y="{bottom + 13}" text-anchor="middle" '
            f'class="soft">{escape(text)}</text>'
        )
    total = _NAMES + max(width * len(blocks), 120) + 4
    return (
        f'<svg viewBox="0 0 {total:.0f} {bottom + 18}" style="max-width:{total:.0f}px" role="img" '
        f'aria-label="error per linear" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _share(value: float, low: float, high: float) -> float:
    if not value or high <= low:
        return 0.0
    return math.log(value / low) / math.log(high / low)
