"""The tables of a report, as text cells: one description for the terminal, Markdown and HTML."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jq.compare.quality import Quality
from jq.compare.results import Comparison
from jq.evaluate import paired_difference

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; `align` has "l" or "r" per column; the note says how to read it."""

    title: str
    headers: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def summary_table(comparison: Comparison) -> Table:
    """What the terminal shows: an arm per line, about 110 characters wide."""
    batches = _batches(comparison)
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("bits", lambda r: number(r["bits_per_weight"], ".2f")),
        ("MB", lambda r: megabytes(r["weight_bytes"])),
        ("perplexity", lambda r: _pair(r, "perplexity", ".3f")),
        ("increase", lambda r: _pair(r, "perplexity_increase", "+.3f")),
        ("KL (mnat)", lambda r: _pair(r, "kl_nats", ".2f", 1e3)),
        ("top-1 %", lambda r: scaled(r.get("top1_agreement"), 100, ".2f")),
        ("make s", lambda r: number(r["making_seconds"], ".0f")),
    ]
    if batches:
        at = f"_batch{batches[0]}"
        columns += [
            ("tokens/s", lambda r: number(r.get(f"decode_tokens_per_second{at}"), ".4g")),
            ("p50 ms", lambda r: number(r.get(f"decode_p50_ms{at}"), ".4g")),
            ("p99 ms", lambda r: number(r.get(f"decode_p99_ms{at}"), ".4g")),
        ]
    note = f"tokens/s, p50, p99: decode at batch size {batches[0]}" if batches else ""
    return _table("Summary", comparison.rows(), columns, note)


def quality_table(comparison: Comparison) -> Table:
    """Quality against the original."""
    rows = comparison.rows()
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("bits/weight", lambda r: number(r["bits_per_weight"], ".3f")),
        ("perplexity (token)", lambda r: _pair(r, "perplexity", ".4f")),
        ("increase", lambda r: _pair(r, "perplexity_increase", "+.4f")),
        ("perplexity (word)", lambda r: _pair(r, "word_perplexity", ".2f")),
        ("KL (mnat/token)", lambda r: _pair(r, "kl_nats", ".3f", 1e3)),
        ("top-1 agreement %", lambda r: _pair(r, "top1_agreement", ".2f", 100)),
    ]
    note = (
        "± is one standard error over windows. The increase is over the original, window by "
        "window; its error is that of the pairs. KL is from the original's predictions, in "
        "thousandths of a nat. Perplexity per word is that of whole words between spaces, made of "
        "the one per token and the text's average; the two do not compare."
    )
    return _table("Quality", rows, columns, note)


def task_table(comparison: Comparison) -> Table | None:
    """Tasks, and the differences from the original; None without any."""
    names = sorted({name for r in comparison.results for name in r.tasks})
    if not names:
        return None
    columns: list[tuple[str, Callable[[Row], str]]] = []
    for name in names:
        task, change = f"task_{name}", f"task_{name}_difference"
        columns += [
            (f"{name} %", lambda r, key=task: _pair(r, key, ".2f", 100)),
            ("change", lambda r, key=change: _pair(r, key, "+.2f", 100)),
        ]
    counts = {name: len(r.tasks[name]) for r in comparison.results for name in r.tasks}
    items = ", ".join(f"{counts[name]} of {name}" for name in names)
    note = (
        f"Items: {items}. ± is one standard error over items; the change is from the original, in "
        "points, item by item, and its error is that of the pairs."
    )
    return _table("Tasks", comparison.rows(), columns, note)


def size_table(comparison: Comparison) -> Table:
    """Bytes, and what making and running took."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("weights MB", lambda r: megabytes(r["weight_bytes"])),
        ("on disk MB", lambda r: megabytes(r["disk_bytes"])),
        ("peak running MB", lambda r: _peaks(r, "peak")),
        ("making s", lambda r: number(r["making_seconds"], ".1f")),
        ("peak making MB", lambda r: _peaks(r, "making_peak")),
    ]
    note = (
        "Whole model, embedding included. Peaks are of a process that did only this, Python and "
        "compilers included: host memory / device memory, where known. Making includes "
        "compilation; its time is empty where it was stopped and went on."
    )
    return _table("Size and making", comparison.rows(), columns, note)


def speed_table(comparison: Comparison) -> Table | None:
    """Latency per arm and batch size; None when nothing was timed."""
    original = comparison.original
    base = {} if original is None else {b["batch_size"]: b for b in original.speed}
    lines = []
    for result in comparison.results:
        for batch in result.speed:
            lines.append((result.name, str(batch["batch_size"]), *_timings(batch, base)))
    if not lines:
        return None
    timing = comparison.spec["timing"]
    headers = (
        *("method", "batch"),
        *("prefill tokens/s", "p50 ms", "p95 ms", "p99 ms"),
        *("decode tokens/s", "p50 ms", "p95 ms", "p99 ms", "against original"),
    )
    note = (
        f"Prompts of {timing['prompt_tokens']} random tokens, {timing['steps']} decode steps per "
        "batch size, compilation left out. The last column is the original's median decode step "
        "over the arm's: above 1 is faster."
    )
    return Table("Speed", headers, "l" + "r" * (len(headers) - 1), tuple(lines), note)


def length_table(comparison: Comparison) -> Table | None:
    """Perplexity of the first tokens of each window, by their number."""
    return _by_edge(
        comparison,
        "Perplexity by sequence length",
        lambda q: q.prefix("nll"),
        lambda low, high: f"{high}",
        "Of the first so many tokens of every window, which is what shorter windows with the same "
        "starts give; different lengths score different tokens. In brackets: increase over the "
        "original, in percent, ± one standard error of the pairs.",
    )


def position_table(comparison: Comparison) -> Table | None:
    """Perplexity of tokens by how many are before them."""
    return _by_edge(
        comparison,
        "Perplexity by position",
        lambda q: q.scores["nll"],
        lambda low, high: f"{low}-{high - 1}",
        "Of tokens with so many before them in their window; otherwise as above.",
    )


def increases(
    quality: Quality, original: Quality, take: Callable[[Quality], Any]
) -> list[tuple[float, float]]:
    """(increase of perplexity as a share, its standard error) for each column of `take`."""
    ours, base = take(quality), take(original)
    found = []
    for column in range(ours.shape[1]):
        value, error = paired_difference(ours[:, column], base[:, column])
        found.append((math.expm1(value), math.exp(value) * error))
    return found


def _by_edge(
    comparison: Comparison,
    title: str,
    take: Callable[[Quality], Any],
    label: Callable[[int, int], str],
    note: str,
) -> Table | None:
    original = comparison.original
    if original is None or original.quality is None:
        return None
    edges = original.quality.edges
    headers = tuple(label(a, b) for a, b in itertools.pairwise(edges))
    rows = []
    for result in comparison.results:
        quality = result.quality
        if quality is None:
            continue
        values = [f"{math.exp(x):.2f}" for x in take(quality).mean(axis=0)]
        if result is not original:
            rises = increases(quality, original.quality, take)
            texts = (f" ({100 * r:+.2f} ±{_error(100 * e)})" for r, e in rises)
            values = [v + text for v, text in zip(values, texts, strict=True)]
        rows.append((result.name, *values))
    return Table(title, ("method", *headers), "l" + "r" * len(headers), tuple(rows), note)


def _table(
    title: str,
    rows: Sequence[Row],
    columns: Sequence[tuple[str, Callable[[Row], str]]],
    note: str,
) -> Table:
    lines = []
    for row in rows:
        cells = ["FAILED", *[""] * (len(columns) - 1)]
        if row["status"] == "done":
            cells = [cell(row) for _, cell in columns]
        lines.append((row["arm"], *cells))
    headers = ("method", *(header for header, _ in columns))
    return Table(title, headers, "l" + "r" * len(columns), tuple(lines), note)


def _batches(comparison: Comparison) -> list[int]:
    timing = comparison.spec.get("timing")
    return [] if timing is None else list(timing["batch_sizes"])


def _timings(batch: Row, base: Mapping[int, Row]) -> list[str]:
    cells = []
    for phase in ("prefill", "decode"):
        cells.append(f"{batch[f'{phase}_tokens_per_second']:.4g}")
        cells += [f"{1e3 * batch[f'{phase}_seconds'][p]:.4g}" for p in ("p50", "p95", "p99")]
    other = base.get(batch["batch_size"])
    ratio = None
    if other is not None:
        ratio = other["decode_seconds"]["p50"] / batch["decode_seconds"]["p50"]
    return [*cells, number(ratio, ".2f")]


def number(value: Any, form: str) -> str:
    """Empty for None."""
    return "" if value is None else format(value, form)


def scaled(value: Any, factor: float, form: str) -> str:
    """`number` of value * factor."""
    return "" if value is None else format(factor * value, form)


def megabytes(value: Any) -> str:
    """Powers of ten."""
    return scaled(value, 1e-6, ".2f" if value is not None and value < 1e8 else ".0f")


def _pair(row: Row, name: str, form: str, factor: float = 1.0) -> str:
    value, error = row.get(name), row.get(f"{name}_stderr")
    if value is None:
        return ""
    text = format(factor * value, form)
    return text if error is None else f"{text} ±{format(factor * error, form.lstrip('+'))}"


def _peaks(row: Row, prefix: str) -> str:
    values = [row.get(f"{prefix}_{place}_bytes") for place in ("host", "device")]
    return " / ".join(megabytes(value) for value in values if value is not None)


def _error(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "?"
