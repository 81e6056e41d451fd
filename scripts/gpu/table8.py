"""The 8-bit kernels' table of times, and whether their goals are met: arithmetic on results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scripts.gpu.goals import all_correct, goal, ideal_us, plausible, ratio
from scripts.gpu.problems8 import Problem8

# The goals, on an H200: speedups over XLA's bfloat16 and its best 8-bit product, the rate of float8
# on the largest weights, the fraction of the measured copy bandwidth, and the share of a product's
# time that quantizing its activations may take.
LARGE_BYTES, LARGEST = 58e6, 4096 * 28672
SPEEDUP_4096, FP8_TFLOPS, COPY_FRACTION, QUANTIZE_SHARE = 1.6, 1350.0, 0.80, 0.10
# The device's matrix rate in 8 bits, over that of bfloat16.
SPEED = 2
# Of a whole model's tokens per second with one sequence, over bfloat16's.
MODEL_SPEEDUPS = {"w4": 2.8, "int8": 1.6, "fp8": 1.6}


def rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per shape, number of rows and format that the kernel was timed for.

    "us" is of the kernel as it chooses by itself, "us_tuned" of the fastest config that was tried;
    "us_best" the smaller, which the ratios are made of.
    """
    facts, sections = data["facts"], data["sections"]
    times = _times(sections.get("benchmark8", {}).get("results", {}).values())
    tuned = {_format(t): t for t in facts.get("tuned8", {}).values()}
    own = {fmt for fmt, method in times if method == "kernel"}
    bf16 = dict(facts.get("bf16_us", {}))
    bf16 |= {_place(f): r["us"] for (f, method), r in times.items() if method == "bf16"}
    found = []
    for fmt in sorted({*tuned, *own}):
        k, n, m, dtype, block = fmt
        row = _row(Problem8(m, k, n, dtype, block), times, tuned.get(fmt, {}), facts)
        row["us_bf16"] = bf16.get(_place(fmt))
        row["vs_bf16"] = ratio(row["us_bf16"], row["us_best"])
        found.append(row)
    return found


def xla_times(data: Mapping[str, Any]) -> dict[tuple[Any, ...], float]:
    """(k, n, m, dtype, block) -> microseconds of XLA's product."""
    results = data["sections"].get("benchmark8", {}).get("results", {})
    return {f: r["us"] for (f, method), r in _times(results.values()).items() if method == "xla"}


def _format(r: Mapping[str, Any]) -> tuple[Any, ...]:
    return (r["k"], r["n"], r["m"], r.get("dtype", "bfloat16"), r.get("block", False))


def _place(fmt: Sequence[Any]) -> str:
    return f"{fmt[0]}x{fmt[1]} m{fmt[2]}"


def _times(results: Iterable[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    return {(_format(r), r["method"]): r for r in results if plausible(r)}


def _row(
    p: Problem8, times: Mapping[Any, Any], tuned: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    fmt = (p.k, p.n, p.m, p.dtype, p.block)
    us = {m: times.get((fmt, m), {}).get("us") for m in ("kernel", "xla", "scaled_matmul", "rows")}
    known = [t for t in (us["kernel"], tuned.get("us")) if t]
    best = min(known) if known else None
    gbs, ideal = ratio(p.moved_bytes() / 1e3, best), ideal_us(p, facts, SPEED)
    others = [t for t in (us["xla"], us["scaled_matmul"]) if t]
    return {
        "k": p.k,
        "n": p.n,
        "m": p.m,
        "format": ("int8" if p.dtype == "int8" else "fp8") + " blocks" * p.block,
        "us": us["kernel"],
        "us_tuned": tuned.get("us"),
        "us_best": best,
        "config": tuned.get("config"),
        "gbs": gbs,
        "tflops": ratio(p.flops / 1e6, best),
        "us_ideal": ideal,
        "fraction": ratio(ideal, best),
        "copy_fraction": ratio(gbs, facts.get("copy_gbs")),
        "us_xla": us["xla"],
        "us_scaled_matmul": us["scaled_matmul"],
        "vs_xla": ratio(min(others), best) if others else None,
        "us_rows": us["rows"],
        "rows_share": ratio(us["rows"], best),
    }


def goals(table: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal at each place it is stated for: "met" is True, False, or None where unmeasured."""
    found = []
    for row in table:
        place = f"{row['k']}x{row['n']} m{row['m']} {row['format']}"
        size = row["k"] * row["n"]
        if row["m"] <= 16 and size >= LARGE_BYTES:
            found.append(goal("8-bit copy bandwidth", place, COPY_FRACTION, row["copy_fraction"]))
        if row["m"] == 4096 and "blocks" not in row["format"]:
            found.append(goal("8-bit speedup over bf16", place, SPEEDUP_4096, row["vs_bf16"]))
            found.append(goal("8-bit speedup over XLA's 8-bit", place, 1.0, row["vs_xla"]))
            if row["format"] == "fp8" and size >= LARGEST:
                found.append(goal("float8 TFLOP/s", place, FP8_TFLOPS, row["tflops"]))
            if row["k"] == 4096 and row["n"] >= 6144:
                # As a fraction that has to be reached, like the others.
                spare = ratio(QUANTIZE_SHARE, row["rows_share"])
                found.append(goal("quantization within a tenth", place, 1.0, spare))
    found += all_correct("correct 8-bit variants", data["sections"].get("correctness8", {}))
    return [*found, *_goals_of_models(data["sections"].get("decode", {}).get("results", {}))]


def _goals_of_models(decoded: Mapping[str, Any]) -> list[dict[str, Any]]:
    rates = {kind: decoded.get(f"{kind} loop batch 1", {}) for kind in (*MODEL_SPEEDUPS, "bf16")}
    found = []
    for kind, needed in MODEL_SPEEDUPS.items():
        got = ratio(rates[kind].get("tokens_per_s"), rates["bf16"].get("tokens_per_s"))
        if decoded:
            found.append(goal("a model's speedup over bf16", f"{kind} batch 1", needed, got))
    return found


COLUMNS = (
    ("k", 6, "d"),
    ("n", 6, "d"),
    ("m", 5, "d"),
    ("format", 10, "s"),
    ("us", 9, ".2f"),
    ("us_tuned", 9, ".2f"),
    ("gbs", 7, ".0f"),
    ("tflops", 7, ".1f"),
    ("fraction", 8, ".2f"),
    ("us_bf16", 9, ".2f"),
    ("vs_bf16", 7, ".2f"),
    ("us_xla", 9, ".2f"),
    ("vs_xla", 7, ".2f"),
    ("rows_share", 10, ".2f"),
)
