"""Small plots as SVG, written by hand: they need no library, no font and no network to be seen.

Colours of text and lines come from the page (`currentColor`), so that plots follow its light or
dark style; marks have the colours of Okabe and Ito, told apart by colour-blind readers too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
WIDTH, HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 14, 48
_LINE = 14.0  # of the labels' font
_BAR_GAP = 3.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A mark: its label, place, standard error of y, colour and shape by index, and a tooltip."""

    label: str
    x: float
    y: float
    error: float
    colour: int
    shape: int
    tip: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A series: label, x, y, standard errors of y, colour by index."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float]
    colour: int


@dataclasses.dataclass(frozen=True)
class Scale:
    """From a value in [low, high] to a place in pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(x) for x in (value, low, high))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high], both positive."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    return [value for value in found if low <= value <= high]


def scatter(
    points: Sequence[Point],
    *,
    xlabel: str,
    ylabel: str,
    line: tuple[float, str] | None = None,
    title: str,
    log: bool = False,
) -> str:
    """Marks with labels and bars of one standard error; `line` is a horizontal one, labelled.

    log: a logarithmic y, for which all values are positive.
    """
    lows = [max(p.y - p.error, p.y / 2) if log else p.y - p.error for p in points]
    ys = [*lows, *(p.y + p.error for p in points), *([line[0]] if line else [])]
    x = Scale(*_padded([p.x for p in points], 0.08), _LEFT, WIDTH - _RIGHT)
    low, high = (min(ys) / 1.5, max(ys) * 1.5) if log else _padded(ys, 0.08)
    y = Scale(low, high, HEIGHT - _BOTTOM, _TOP, log)
    parts = _axes(x, y, xlabel, ylabel, ticks(x.low, x.high, 6))
    places = _side_by_side([x(p.x) for p in points])
    marks = list(zip(points, places, [y(p.y) for p in points], strict=True))
    taken = [_box(px - 6, py - 6, 12, 12) for _, px, py in marks]
    if line is not None:
        width, height = _wide(line[1]), y(line[0])
        starts = [_LEFT + 6 + i * (WIDTH - _RIGHT - _LEFT - 12 - width) / 8 for i in range(9)]
        boxes = [_box(start, height - 18, width, 20) for start in starts]
        box = max(boxes, key=lambda b: min((_distance(b, t) for t in taken), default=0.0))
        parts.append(
            f'<path d="M{_LEFT} {height:.1f}H{WIDTH - _RIGHT}" class="base"/>'
            + _text(box[0], height - 5, line[1], "start", "soft")
        )
        taken += [box, _box(_LEFT, height - 1, WIDTH - _RIGHT - _LEFT, 2)]
    for (p, px, py), bottom in zip(marks, lows, strict=True):
        parts.append(_mark(px, py, y(bottom), y(p.y + p.error), p))
    # A label may not stand on a bar either, its own included.
    bars = zip(marks, lows, strict=True)
    taken += [_box(px - 3, y(p.y + p.error), 6, y(b) - y(p.y + p.error)) for (p, px, _), b in bars]
    for p, px, py in marks:
        parts.append(_label(p, px, py, taken))
    return _svg(parts, title)


def lines(
    series: Sequence[Line], *, xlabel: str, ylabel: str, title: str, base: float | None = None
) -> str:
    """Lines over a logarithmic x, labelled at their right ends; `base` is a horizontal line."""
    xs = sorted({x for s in series for x in s.x})
    ys = [
        y + sign * e for s in series for y, e in zip(s.y, s.errors, strict=True) for sign in (-1, 1)
    ]
    room = 12 + max(_wide(s.label) for s in series)
    x = Scale(xs[0], max(xs[-1], 1.01 * xs[0]), _LEFT + 8, WIDTH - _RIGHT - room, log=True)
    y = Scale(*_padded(ys + ([] if base is None else [base]), 0.05), HEIGHT - _BOTTOM, _TOP)
    parts = _axes(x, y, xlabel, ylabel, xs)
    if base is not None:
        parts.append(f'<path d="M{_LEFT} {y(base):.1f}H{x.end:.1f}" class="base"/>')
    ends = sorted(series, key=lambda s: y(s.y[-1]))
    heights = spread([y(s.y[-1]) for s in ends], _LINE)
    for rank, (s, height) in enumerate(zip(ends, heights, strict=True)):
        colour = _colour(s.colour)
        aside = _BAR_GAP * (rank - (len(ends) - 1) / 2)  # so that no bar hides another
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in zip(s.x, s.y, strict=True))
        bars = "".join(
            f"M{x(a) + aside:.1f} {y(b - e):.1f}V{y(b + e):.1f}"
            for a, b, e in zip(s.x, s.y, s.errors, strict=True)
        )
        parts.append(
            f'<g stroke="{colour}" fill="none"><title>{escape(s.label)}</title>'
            f'<path d="M{path}" stroke-width="2"/><path d="{bars}" opacity=".7"/></g>'
        )
        parts.append(
            f'<path d="M{x.end:.1f} {y(s.y[-1]):.1f}L{x.end + 8:.1f} {height:.1f}" '
            f'stroke="{colour}" opacity=".5"/>'
            + _text(x.end + 11, height + 4, s.label, "start", "", colour)
        )
    return _svg(parts, title)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved at least `gap` apart, with the least sum of squared moves."""
    # Less i gaps each, that is isotonic regression: neighbours out of order share their mean.
    runs: list[tuple[float, int]] = []
    for i, place in enumerate(places):
        total, count = place - i * gap, 1
        while runs and runs[-1][0] / runs[-1][1] >= total / count:
            total, count = total + runs[-1][0], count + runs[-1][1]
            runs.pop()
        runs.append((total, count))
    means = [total / count for total, count in runs for _ in range(count)]
    return [mean + i * gap for i, mean in enumerate(means)]


def _colour(index: int) -> str:
    """Grey for a negative index."""
    return COLOURS[index % len(COLOURS)] if index >= 0 else "#808080"


def _side_by_side(places: Sequence[float], gap: float = 8.0) -> list[float]:
    """Places along x, those that (almost) coincide moved apart, so that no bar hides another."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    clusters: list[list[int]] = []
    for i in order:
        if clusters and places[i] - places[clusters[-1][-1]] < gap / 2:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    for cluster in clusters:
        for rank, i in enumerate(cluster):
            moved[i] += gap * (rank - (len(cluster) - 1) / 2)
    return moved


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    return low - share * span, high + share * span


def _axes(x: Scale, y: Scale, xlabel: str, ylabel: str, xticks: Sequence[float]) -> list[str]:
    parts = []
    for value in log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high, 6):
        place = y(value)
        parts.append(f'<path d="M{_LEFT} {place:.1f}H{WIDTH - _RIGHT}" class="grid"/>')
        parts.append(_text(_LEFT - 7, place + 4, f"{value:.6g}", "end", "soft"))
    for value in xticks:
        parts.append(f'<path d="M{x(value):.1f} {HEIGHT - _BOTTOM}v5" class="axis"/>')
        text = f"{value:.6g}"
        parts.append(_text(x(value), HEIGHT - _BOTTOM + 18, text, "middle", "soft"))
    parts.append(f'<path d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}" class="axis"/>')
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 10, xlabel, "middle"))
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text x="14" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle:.1f})">{escape(ylabel)}</text>'
    )
    return parts


def _mark(x: float, y: float, bottom: float, top: float, point: Point) -> str:
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 10h-12z"/>',
        f'<path d="M{x:.1f} {y + 6:.1f}l6 -10h-12z"/>',
    )
    colour = _colour(point.colour)
    bar = f"M{x:.1f} {bottom:.1f}V{top:.1f}"
    caps = f"M{x - 3:.1f} {bottom:.1f}h6M{x - 3:.1f} {top:.1f}h6"
    return (
        f'<g fill="{colour}" stroke="{colour}"><title>{escape(point.tip)}</title>'
        f'<path d="{bar}{caps}" fill="none"/>{shapes[point.shape % len(shapes)]}</g>'
    )


Box = tuple[float, float, float, float]


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x, y, x + width, y + height


def _label(point: Point, x: float, y: float, taken: list[Box]) -> str:
    """The label of a mark where it covers nothing, the nearer the better; remembers its place."""
    width = _wide(point.label)
    places = [
        (x + dx if dx > 0 else x + dx - width if dx < 0 else x - width / 2, y + dy)
        for reach in (1, 2, 3, 4.5, 6, 8)
        for dx, dy in (
            *((11 * reach, 0), (-11 * reach, 0), (0, -16 * reach), (0, 16 * reach)),
            *((11 * reach, -13 * reach), (11 * reach, 13 * reach)),
            *((-11 * reach, -13 * reach), (-11 * reach, 13 * reach)),
        )
    ]
    boxes = [_box(a, b - _LINE / 2, width, _LINE) for a, b in places]
    inside = [b for b in boxes if b[0] > _LEFT and b[2] < WIDTH and b[1] > 0]
    inside = [b for b in inside if b[3] < HEIGHT - _BOTTOM] or boxes
    box = next((b for b in inside if not any(_overlap(b, t) for t in taken)), inside[0])
    taken.append(box)
    colour = _colour(point.colour)
    left = box[2] < x  # its end is what is known for sure, whatever the font's width
    text = _text(
        box[2 if left else 0], box[3] - 3, point.label, "end" if left else "start", "", colour
    )
    near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    if math.hypot(near_x - x, near_y - y) < 16:
        return text
    leader = f'<path d="M{x:.1f} {y:.1f}L{near_x:.1f} {near_y:.1f}" class="leader"/>'
    return leader + text


def _wide(text: str) -> float:
    """A text's width, rather too much: which font the page finds is not known."""
    return 7.0 * len(text) + 4


def _distance(a: Box, b: Box) -> float:
    across = max(a[0] - b[2], b[0] - a[2], 0.0)
    return math.hypot(across, max(a[1] - b[3], b[1] - a[3], 0.0))


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text(
    x: float, y: float, text: str, anchor: str, style: str = "", colour: str | None = None
) -> str:
    look = f' class="{style}"' if style else ""
    fill = f' style="fill:{colour}"' if colour else ""  # a style: the page's sets all texts' colour
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}{fill}>{escape(text)}</text>'


def _svg(parts: Sequence[str], title: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
