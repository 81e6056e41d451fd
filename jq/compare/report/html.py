"""report.html: one file with everything in it, plots as SVG; nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jq.compare.report.content import Content
from jq.compare.report.figures import Figure
from jq.compare.report.heatmap import heatmaps, legends
from jq.compare.report.tables import Table

_STYLE = """
:root { color-scheme: light dark; --soft: #666; --rule: #ddd; --page: #fff; --ink: #1b1b1b;
  --card: #f6f6f4; --mark: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --soft: #a0a0a0; --rule: #3a3a3a; --page: #161616;
  --ink: #e6e6e6; --card: #202020; --mark: #56B4E9; }
  .plots svg { filter: brightness(1.25); } }
body { margin: 0 auto; max-width: 1360px; padding: 24px 20px 60px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6em; margin: 0 0 .3em; } h2 { font-size: 1.15em; margin: 2em 0 .5em; }
p { max-width: 78ch; } .soft, figcaption, .note { color: var(--soft); }
.decision { background: var(--card); border-left: 5px solid var(--mark); padding: 12px 18px;
  max-width: 78ch; } .decision strong { font-size: 1.15em; } .decision ul { margin: .5em 0 0; }
.failed { border-left: 5px solid #D55E00; padding: 2px 16px; max-width: 78ch;
  overflow-wrap: anywhere; }
.unfair { max-width: 78ch; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px;
  font-variant-numeric: tabular-nums; } th, td { padding: 3px 10px; white-space: nowrap;
  border-bottom: 1px solid var(--rule); } th { text-align: left; font-weight: 600; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
summary { cursor: pointer; } summary h2 { display: inline-block; margin-bottom: .2em; }
.r { text-align: right; } tr.chosen td { background: var(--card); font-weight: 600; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr));
  gap: 24px 32px; } figure { margin: 0; overflow-x: auto; } .plots svg { min-width: 440px; }
figure { min-width: 0; } figure h3 { margin: 0 0 4px; font-size: 1em; }
figcaption, .note { font-size: 13px; } svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; paint-order: stroke;
  stroke: var(--page); stroke-width: 3px; }
svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); fill: none; }
svg .base { stroke: var(--soft); stroke-dasharray: 5 4; fill: none; }
svg .leader { stroke: var(--soft); stroke-width: .7; } svg.legend { max-width: 460px; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 18px; }
"""


def html(
    content: Content,
    figures: Sequence[Figure],
    linears: Mapping[str, Sequence[Mapping[str, Any]]],
    chosen: str | None,
) -> str:
    """The whole file.

    linears: errors per linear by arm; chosen: the arm whose rows stand out.
    """
    parts = [f"<h1>{escape(content.title)}</h1>", f'<p class="soft">{escape(content.setting)}</p>']
    first, *more = content.verdict
    parts.append(f'<div class="decision"><strong>{escape(first)}</strong>{_bullets(more)}</div>')
    if content.unfair:
        parts.append(f'<div class="unfair">{_bullets(content.unfair)}</div>')
    if content.failures:
        parts.append(f'<h2>Failed</h2><div class="failed">{_bullets(content.failures)}</div>')
    if figures:
        parts.append(f'<h2>Plots</h2><div class="plots">{"".join(map(_figure, figures))}</div>')
    parts += [_errors(linears)]
    for table in content.tables:
        parts.append(_table(table, chosen))
    parts.append("<h2>Before you rely on it</h2>" + _bullets(content.cautions))
    parts += [_folded(table) for table in (content.arms, content.facts)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(content.title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _figure(figure: Figure) -> str:
    return (
        f"<figure><h3>{escape(figure.title)}</h3>{figure.svg}"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _errors(linears: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    maps = heatmaps(linears)
    if not maps:
        return ""
    cells = "".join(
        f"<figure><h3>{escape(name)}</h3>{svg}<figcaption>{escape(what)}</figcaption></figure>"
        for name, what, svg in maps
    )
    note = (
        "Layers from left to right. Outputs: on the calibration tokens; arms that saw none show "
        "their weights' errors, which are other numbers, on a scale of their own. Point at a cell "
        "for its value."
    )
    return (
        f'<h2>Error of every linear</h2>{"".join(legends(linears))}<div class="maps">{cells}</div>'
        f'<p class="note">{note}</p>'
    )


def _table(table: Table, chosen: str | None, style: str = "") -> str:
    sides = ['<th class="r">' if side == "r" else "<th>" for side in table.align]
    heads = zip(sides, table.headers, strict=True)
    head = "".join(f"{tag}{escape(text)}</th>" for tag, text in heads)
    rows = []
    for row in table.rows:
        mark = ' class="chosen"' if row[0] == chosen else ""
        cells = zip(table.align, row, strict=True)
        texts = (f"<td{' class="r"' if s == 'r' else ''}>{escape(c)}</td>" for s, c in cells)
        rows.append(f"<tr{mark}>{''.join(texts)}</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table class="{style}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _folded(table: Table) -> str:
    """A table that is shown when its title is clicked."""
    whole = _table(table, None, "facts")
    title = f"<h2>{escape(table.title)}</h2>"
    return f"<details><summary>{title}</summary>{whole.removeprefix(title)}</details>"


def _bullets(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
