"""Everything that a GPU is needed for, in order of value, in one command of less than ten minutes.

    python scripts/gpu_check.py [--out FOLDER] [--budget SECONDS] [--sections NAME ...]
                                [--resume RESULTS.json] [--marlin CHECKOUT]

Writes gpu_check.json (rewritten every few seconds: whatever ends it, little is lost) and
gpu_check.txt, a summary, into --out (default: $OUT, else the folder out/gpu-check), and
prints the summary.  --resume takes over what an earlier run has done, so that a second command goes
on where the first ended. Needs jax, flax and numpy, and no install of the package.

Every section runs in processes of its own; what fails, hangs or crashes is written down with its
traceback, and the rest goes on.  Ampere and Ada have no tables of tile sizes to fill, and Ampere no
float8: what is for those is skipped.  Without a GPU that has kernels it compiles for Hopper what it
can, and says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find scripts.* and jq

from scripts.gpu.runner import Results, Section, run

SECTIONS = (
    Section("environment", "scripts.gpu.environment", 3, 90, needs_gpu=False),
    Section("ceilings", "scripts.gpu.ceilings", 3, 60),
    Section("correctness", "scripts.gpu.correctness", 20, 120, workers=4),
    Section("benchmark", "scripts.gpu.benchmark", 28, 120),
    Section("correctness8", "scripts.gpu.correctness8", 14, 120, workers=4),
    Section("benchmark8", "scripts.gpu.benchmark8", 26, 120),
    Section("decode", "scripts.gpu.decode", 26, 240),
    Section("tune", "scripts.gpu.tune", 20, 60),
    Section("tune8", "scripts.gpu.tune8", 14, 60),
    Section("refine", "scripts.gpu.refine", 6, 60),
    Section("large_block", "scripts.gpu.large_block", 20, 240, needs_gpu=False),
    Section("marlin", "scripts.gpu.marlin", 8, 240),
    Section("compile", "scripts.gpu.compile_only", 30, 240, needs_gpu=False),
)
BUDGET_S = 570


def learn(name: str, found: Mapping[str, Any], facts: dict[str, Any]) -> None:
    """What later sections, and the summary, need to know of a section's results."""
    if name == "environment":
        from jq.pallas_kernels.capability import HOPPER, SERVED, told

        device = found.get("device", {})
        facts["device"] = device.get("kind")
        cuda = device.get("platform") in ("gpu", "cuda")
        capability = told(device.get("capability")) if cuda else None
        facts["gpu"] = capability in SERVED
        if facts["gpu"]:
            facts["hopper"] = capability == HOPPER
        facts["timer"] = "cupti" if found.get("cupti", {}).get("works") else "wall"
    elif name == "ceilings":
        for key, field, fact in (
            ("copy", "gbs", "copy_gbs"),
            ("read", "gbs", "read_gbs"),
            ("matmul", "tflops", "bf16_tflops"),
            ("launch", "us", "launch_us"),
        ):
            if key in found:
                facts[fact] = found[key][field]
    elif name == "benchmark":
        facts["bf16_us"] = {
            f"{r['k']}x{r['n']} m{r['m']}": r["us"] for r in found.values() if r["method"] == "bf16"
        }
    elif name in ("tune", "refine", "tune8"):
        from scripts.gpu import tune

        tuned = facts.setdefault("tuned8" if name == "tune8" else "tuned", {})
        for key, entry in tune.best(found.values()).items():
            if key not in tuned or entry["us"] < tuned[key]["us"]:
                tuned[key] = entry


def unwanted(section: Section, facts: Mapping[str, Any]) -> str | None:
    """Why a section is skipped, if it is."""
    if section.name == "compile" and facts.get("gpu"):
        return "there is a GPU: everything above was compiled and run"
    if section.needs_gpu and not facts.get("gpu"):
        return "no GPU of compute capability 8.0, 8.6, 8.9 or 9.0"
    if section.name in ("tune", "tune8", "refine") and not facts.get("hopper"):
        return "the tables of tile sizes are for compute capability 9.0"
    if section.name == "marlin" and not facts.get("marlin"):
        return "no source of Marlin given (--marlin)"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write and print.  The exit code is 0 unless a variant of the kernel is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [s.name for s in SECTIONS]
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/gpu-check")))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--sections", nargs="+", choices=names, help="beside environment")
    parser.add_argument("--resume", type=Path, help="gpu_check.json of an earlier run")
    parser.add_argument("--marlin", type=Path, help="a checkout of Marlin to build and time")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = {*names} if args.sections is None else {"environment", *args.sections}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    meta = {"started": now, "command": sys.argv[1:], "budget_s": args.budget}
    results = Results(args.out / "gpu_check.json", meta)
    if args.resume is not None:
        results.take_over(json.loads(args.resume.read_text(encoding="utf-8")))
    if args.marlin is not None:
        results.data["facts"]["marlin"] = str(args.marlin.resolve())
    sections = [s for s in SECTIONS if s.name in wanted]
    run(sections, results, args.budget, learn, unwanted)
    return summarize(results, args.out)


def summarize(results: Results, out: Path) -> int:
    """Add table and goals to the JSON, write and print the text."""
    try:
        from scripts.gpu import large_block, table, table8, tune, tune8

        data = results.data
        found, found8 = table.rows(data), table8.rows(data)
        data["table"], data["table8"] = found, found8
        data["goals"] = [*table.goals(found, data), *table8.goals(found8, data)]
        tuned, tuned8 = data["facts"].get("tuned", {}), data["facts"].get("tuned8", {})
        data["tuning_rows"] = tune.table_rows(tuned, table.dequantize_times(data))
        data["tuning_rows8"] = tune8.table_rows(tuned8, table8.xla_times(data))
        text = table.text(data) + large_block.text(data)
    except Exception as error:  # the results themselves are there all the same
        text = f"no summary: {type(error).__name__}: {error}\n"
        results.data["summary_error"] = text
    results.flush()
    (out / "gpu_check.txt").write_text(text, encoding="utf-8")
    print(text, end="")
    checked = [results.data["sections"].get(name, {}) for name in ("correctness", "correctness8")]
    wrong = [r for c in checked for r in c.get("results", {}).values() if not r["ok"]]
    return 1 if wrong or any(c.get("errors") for c in checked) else 0


if __name__ == "__main__":
    sys.exit(main())
