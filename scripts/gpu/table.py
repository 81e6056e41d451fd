"""The table of times, and whether the goals are met: arithmetic on results alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scripts.gpu import table8
from scripts.gpu.goals import all_correct, goal, ideal_us, plausible, ratio
from scripts.gpu.problems import Problem

# The goals, on an H200: fractions of the measured copy bandwidth, and speedups over XLA's bfloat16.
LARGE_BYTES = 29e6
COPY_FRACTION = 0.85
SPEEDUP_LARGE, SPEEDUP_SMALL, SPEEDUP_64, SPEEDUP_4096 = 3.3, 2.0, 2.3, 0.95


def rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per shape and number of rows that the kernel was timed for.

    "us" is of the kernel as it chooses by itself, "us_tuned" of the fastest config that was tried;
    "us_best" the smaller, which the ratios are made of.
    """
    facts, sections = data["facts"], data["sections"]
    times = _times(sections.get("benchmark", {}).get("results", {}).values())
    marlin = {
        (r["k"], r["n"], r["m"]): r["us"]
        for r in sections.get("marlin", {}).get("results", {}).values()
        if r.get("us")
    }
    tuned = {(t["k"], t["n"], t["m"]): t for t in facts.get("tuned", {}).values()}
    found = []
    for size in sorted({*tuned, *(s for s, method in times if method == "w4")}):
        own = times.get((size, "w4"), {})
        best = tuned.get(size, {})
        row = _row(Problem(size[2], size[0], size[1]), own, best, facts)
        for method, column in (("bf16", "vs_bf16"), ("dequantize", "vs_dequantize")):
            other = times.get((size, method), {}).get("us")
            row[f"us_{method}"] = other
            row[column] = ratio(other, row["us_best"])
        row["us_marlin"] = marlin.get(size)
        row["vs_marlin"] = ratio(marlin.get(size), row["us_best"])
        found.append(row)
    return found


def dequantize_times(data: Mapping[str, Any]) -> dict[tuple[int, int, int], float]:
    """(k, n, m) -> microseconds of XLA dequantizing and multiplying."""
    results = data["sections"].get("benchmark", {}).get("results", {})
    times = _times(results.values())
    return {
        size: result["us"] for (size, method), result in times.items() if method == "dequantize"
    }


def _times(results: Iterable[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    return {((r["k"], r["n"], r["m"]), r["method"]): r for r in results if plausible(r)}


def _row(
    p: Problem, own: Mapping[str, Any], tuned: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    times = [t for t in (own.get("us"), tuned.get("us")) if t]
    best = min(times) if times else None
    ideal = ideal_us(p, facts)
    gbs = ratio(p.moved_bytes() / 1e3, best)
    return {
        "k": p.k,
        "n": p.n,
        "m": p.m,
        "us": own.get("us"),
        "us_tuned": tuned.get("us"),
        "us_best": best,
        "us_wall": own.get("us_wall"),
        "config": tuned.get("config"),
        "gbs": gbs,
        "tflops": ratio(p.flops / 1e6, best),
        "us_ideal": ideal,
        "fraction": ratio(ideal, best),
        "copy_fraction": ratio(gbs, facts.get("copy_gbs")),
    }


def goals(table: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal at each place it is stated for: "met" is True, False, or None where unmeasured."""
    found = []
    for row in table:
        place = f"{row['k']}x{row['n']} m{row['m']}"
        large = row["k"] * row["n"] / 2 >= LARGE_BYTES
        if row["m"] <= 16 and large:
            found.append(goal("copy bandwidth", place, COPY_FRACTION, row["copy_fraction"]))
        if row["m"] <= 16:
            needed = SPEEDUP_LARGE if large else SPEEDUP_SMALL
            found.append(goal("speedup over bf16", place, needed, row["vs_bf16"]))
        if row["m"] == 64:
            found.append(goal("speedup over bf16", place, SPEEDUP_64, row["vs_bf16"]))
        if row["m"] == 4096:
            found.append(goal("speedup over bf16", place, SPEEDUP_4096, row["vs_bf16"]))
        ratios = [row["vs_bf16"], row["vs_dequantize"]]
        known = [r for r in ratios if r is not None]
        # Slower than one of them is allowed, than both is not.
        got = max(known) if known and (len(known) == 2 or max(known) >= 1) else None
        found.append(goal("not slower than both", place, 1.0, got))
    return found + all_correct("correct variants", data["sections"].get("correctness", {}))


_COLUMNS = (
    ("k", 6, "d"),
    ("n", 6, "d"),
    ("m", 5, "d"),
    ("us", 9, ".2f"),
    ("us_tuned", 9, ".2f"),
    ("gbs", 7, ".0f"),
    ("tflops", 7, ".1f"),
    ("fraction", 8, ".2f"),
    ("us_bf16", 9, ".2f"),
    ("vs_bf16", 7, ".2f"),
    ("vs_dequantize", 13, ".2f"),
    ("vs_marlin", 9, ".2f"),
)


def text(data: Mapping[str, Any]) -> str:
    """What a reader wants to see last."""
    lines = []
    facts = data["facts"]
    known = ("copy_gbs", "read_gbs", "bf16_tflops", "launch_us")
    told = [f"{name} {facts[name]:.1f}" for name in known if facts.get(name)]
    lines.append(
        f"{facts.get('device', 'no device')}; timer {facts.get('timer')}; {', '.join(told)}"
    )
    table, table_of_8 = rows(data), table8.rows(data)
    lines += _table(table, _COLUMNS)
    lines += _table(table_of_8, table8.COLUMNS)
    lines += _correctness("correct", data["sections"].get("correctness", {}))
    lines += _correctness("correct, 8 bits", data["sections"].get("correctness8", {}))
    lines += _decode(data["sections"].get("decode", {}).get("results", {}))
    lines += _goals([*goals(table, data), *table8.goals(table_of_8, data)])
    lines += _sections(data["sections"])
    return "\n".join(lines) + "\n"


_TOLD = ("error", "own_rounding", "unwritten", "varying", "other_codes", "other_scales")


def _table(found: Sequence[Mapping[str, Any]], columns: Sequence[Any]) -> list[str]:
    lines = ["  ".join(name.rjust(width) for name, width, _ in columns)] if found else []
    for row in found:
        cells = []
        for name, width, form in columns:
            value = row[name]
            cells.append(("" if value is None else format(value, form)).rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def _correctness(title: str, section: Mapping[str, Any]) -> list[str]:
    results = section.get("results", {})
    bad = {key: r for key, r in results.items() if not r["ok"]}
    errors = section.get("errors", {})
    lines = [f"{title}: {len(results) - len(bad)} of {len(results) + len(errors)} variants"]
    for key, r in list(bad.items())[:12]:
        told = {n: v for n, v in r.items() if n in _TOLD}
        lines.append(f"  WRONG {key}: {told}")
    lines += [f"  FAILED {key}: {e['error'][:160]}" for key, e in list(errors.items())[:12]]
    return lines if results or errors else []


def _decode(results: Mapping[str, Any]) -> list[str]:
    return [
        f"decode {key}: {r['step_ms']:.3f} ms per step, {r['tokens_per_s']:.0f} tokens/s"
        for key, r in results.items()
    ]


def _sections(sections: Mapping[str, Any]) -> list[str]:
    """What did not go well, a line or two for each section."""
    lines = []
    for name, entry in sections.items():
        levels = Counter(r["level"] for r in entry["results"].values() if "level" in r)
        told = "".join(f", {count} as {level}" for level, count in levels.items())
        counts = f"{len(entry['results'])} done{told}, {len(entry['errors'])} errors"
        lines.append(f"[{name}] {entry['status']}: {counts}, {len(entry['not_run'])} not run")
        if not name.startswith("correctness"):
            for key, error in list(entry["errors"].items())[:3]:
                lines.append(f"  {key}: {error['error'][:200]}")
        lines += [f"  {problem.strip()[-300:]}" for problem in entry["problems"][:2]]
    return lines


def _goals(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(g["goal"] for g in found):
        some = [g for g in found if g["goal"] == name]
        met, known = sum(g["met"] is True for g in some), [g for g in some if g["met"] is not None]
        line = f"goal {name}: met at {met} of {len(known)} places measured, of {len(some)}"
        missed = [g for g in known if not g["met"]]
        worst = min(missed, key=lambda g: g["got"] / g["needed"], default=None)
        if worst is not None and math.isfinite(worst["got"]):
            line += f"; worst {worst['place']}: {worst['got']:.3f} of {worst['needed']}"
        lines.append(line)
    return lines
