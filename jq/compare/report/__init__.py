"""The files of a comparison: report.md, report.html, results.csv and results.json."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jq.compare.decision import Budget, Decision
from jq.compare.report.content import content
from jq.compare.report.figures import figures
from jq.compare.report.html import html
from jq.compare.report.markdown import markdown
from jq.compare.report.tables import Table, summary_table, task_table
from jq.compare.results import Comparison
from jq.compare.store import write_json, write_text

__all__ = ["Table", "results_json", "summary_table", "task_table", "write_reports"]


def write_reports(
    folder: str | os.PathLike[str], comparison: Comparison, decision: Decision, budget: Budget
) -> list[Path]:
    """Write all of them, each whole or not at all; returns their paths.

    Raises: OutputError when the disk refuses.
    """
    folder = Path(folder)
    words = content(comparison, decision, budget)
    linears = {r.name: r.linears for r in comparison.results if r.done and r.linears}
    page = html(words, figures(comparison), linears, decision.chosen)
    write_text(folder / "report.md", markdown(words))
    write_text(folder / "report.html", page)
    write_text(folder / "results.csv", csv_text(comparison.rows()))
    write_json(folder / "results.json", results_json(comparison, decision, budget))
    names = ("report.html", "report.md", "results.csv", "results.json")
    return [folder / name for name in names]


def results_json(comparison: Comparison, decision: Decision, budget: Budget) -> dict[str, Any]:
    """Everything, as JSON values: spec, rows, decision, and what was measured window by window."""
    details = {
        r.name: {k: v for k, v in r.raw.items() if k not in ("spec_hash", "format")}
        for r in comparison.results
    }
    return {
        "spec": dict(comparison.spec),
        "spec_hash": comparison.spec_hash,
        "budget": dataclasses.asdict(budget),
        "decision": decision.to_dict(),
        "rows": comparison.rows(),
        "arms": details,
    }


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines below a line of keys; None is an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
