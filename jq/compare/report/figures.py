"""The plots of a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jq.compare.quality import Quality
from jq.compare.report.svg import Line, Point, lines, scatter
from jq.compare.report.tables import increases
from jq.compare.results import ArmResult, Comparison

# An arm has its colour in all plots; arms of one family have one shape.
_SHAPES = {"RTN": 0, "original": 1, "GPTQ": 2, "AWQ": 3, "8-bit": 4}
_BARS = "Bars: one standard error of the difference from the original."
_APART = "Marks that would hide one another stand side by side."


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot, what stands above and below it."""

    title: str
    svg: str
    caption: str


def figures(comparison: Comparison) -> list[Figure]:
    """All plots that there are numbers for."""
    rows = {row["arm"]: row for row in comparison.rows() if row["status"] == "done"}
    done = [r for r in comparison.results if r.done]
    found = [
        _against(
            comparison,
            "Quality against size",
            "weights of the whole model, MB",
            {name: row["weight_bytes"] / 1e6 for name, row in rows.items()},
            f"Further down and to the left is better. {_BARS} {_APART}",
        ),
        _divergence(comparison),
    ]
    for batch in (comparison.spec.get("timing") or {}).get("batch_sizes", ()):
        key = f"decode_tokens_per_second_batch{batch}"
        found.append(
            _against(
                comparison,
                f"Quality against speed, batch size {batch}",
                "decode, tokens per second",
                {name: row[key] for name, row in rows.items() if row.get(key) is not None},
                f"Further down and to the right is better. {_BARS} Speed: the mean over all timed "
                f"steps; percentiles are in the table below. {_APART}",
            )
        )
    if comparison.original is not None and len(done) > 1:
        found += [
            _along(
                comparison,
                "Loss by sequence length",
                "tokens of a sequence",
                lambda q: q.prefix("nll"),
                [float(x) for x in _quality(done[0]).edges[1:]],
            ),
            _along(
                comparison,
                "Loss by position",
                "tokens before, at the stretch's end",
                lambda q: q.scores["nll"],
                [float(x) for x in _quality(done[0]).edges[1:]],
            ),
        ]
    return [figure for figure in found if figure.svg]


def _against(
    comparison: Comparison, title: str, xlabel: str, xs: dict[str, float], caption: str
) -> Figure:
    points, line = [], None
    for row in comparison.rows():
        if row["arm"] not in xs:
            continue
        rise = row.get("perplexity_increase")
        error = row.get("perplexity_increase_stderr") or 0.0
        tip = f"{row['arm']}: perplexity {row['perplexity']:.4f}, {xs[row['arm']]:.5g}"
        tip += "" if rise is None else f", increase {rise:+.4f} ±{error:.4f}"
        arm = comparison.find(row["arm"]).arm
        colour, shape = _colour(comparison, arm.name), _SHAPES.get(arm.family, 5)
        points.append(Point(arm.name, xs[arm.name], row["perplexity"], error, colour, shape, tip))
        if arm.spec is None:
            line = (row["perplexity"], "perplexity of the original")
    if not points:
        return Figure(title, "", caption)
    svg = scatter(points, xlabel=xlabel, ylabel="perplexity per token", line=line, title=title)
    return Figure(title, svg, caption)


def _divergence(comparison: Comparison) -> Figure:
    """KL against size, which tells arms apart that perplexity does not."""
    points = []
    for row in comparison.rows():
        kl, error = row.get("kl_nats"), row.get("kl_nats_stderr") or 0.0
        if not kl or kl <= 0:
            continue
        arm = comparison.find(row["arm"]).arm
        colour, shape = _colour(comparison, arm.name), _SHAPES.get(arm.family, 5)
        size = row["weight_bytes"] / 1e6
        tip = f"{arm.name}: {1e3 * kl:.4g} mnat per token, {size:.5g} MB"
        points.append(Point(arm.name, size, 1e3 * kl, 1e3 * error, colour, shape, tip))
    title, caption = "Divergence against size", "Bars: one standard error over windows."
    if not points:
        return Figure(title, "", caption)
    svg = scatter(
        points,
        xlabel="weights of the whole model, MB",
        ylabel="KL from the original, mnat per token",
        title=title,
        log=True,
    )
    return Figure(title, svg, f"Further down and to the left is better. {caption} {_APART}")


def _along(
    comparison: Comparison,
    title: str,
    xlabel: str,
    take: Callable[[Quality], Any],
    edges: Sequence[float],
) -> Figure:
    original = comparison.original
    assert original is not None
    series = []
    for result in comparison.results:
        if not result.done or result is original:
            continue
        rises = increases(_quality(result), _quality(original), take)
        errors = [100 * e if e == e else 0.0 for _, e in rises]  # NaN where there is one window
        colour = _colour(comparison, result.name)
        series.append(Line(result.name, edges, [100 * r for r, _ in rises], errors, colour))
    svg = lines(series, xlabel=xlabel, ylabel="increase of perplexity, %", title=title, base=0.0)
    return Figure(title, svg, "Increase of the perplexity over the original's. " + _BARS)


def _colour(comparison: Comparison, name: str) -> int:
    """By place in the list of arms; grey for the original, which is the first."""
    return [r.name for r in comparison.results].index(name) - 1


def _quality(result: ArmResult) -> Quality:
    quality = result.quality
    assert quality is not None
    return quality
