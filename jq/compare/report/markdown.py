"""report.md: the words and tables, for readers of plain text."""

from __future__ import annotations

from jq.compare.report.content import Content
from jq.compare.report.tables import Table


def markdown(content: Content) -> str:
    """The whole file."""
    parts = [f"# {content.title}", content.setting, "## Decision"]
    parts.append("**" + content.verdict[0] + "** " + " ".join(content.verdict[1:]))
    if content.unfair:
        parts.append(_bullets(content.unfair))
    if content.failures:
        parts += ["## Failed", _bullets(content.failures)]
    for table in content.tables:
        parts += [f"## {table.title}", markdown_table(table)]
        parts += [table.note] if table.note else []
    parts += ["## Before you rely on it", _bullets(content.cautions)]
    for table in (content.arms, content.facts):
        parts += [f"## {table.title}", markdown_table(table)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown, aligned for readers of the file as well."""
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in table.rows]
    lines = [table.headers, *rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(table.headers))]
    rule = tuple(
        "-" * width if side == "l" else "-" * (width - 1) + ":"
        for side, width in zip(table.align, widths, strict=True)
    )
    padded = [
        [
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(line, widths, table.align, strict=True)
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def _bullets(texts: tuple[str, ...]) -> str:
    return "\n".join(f"* {text}" for text in texts)
