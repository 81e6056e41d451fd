"""`jaxq eval --tasks`: tasks of lm-evaluation-harness, as a table or JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jq.cli.devices import load_model, model_mesh
from jq.cli.options import split_names
from jq.cli.output import note, print_json, print_table, warn
from jq.cli.progress import Meter


def run_eval(args: Any, folder: Path) -> int:
    """Measure and print; args: of `jq.cli.eval`."""
    mesh = model_mesh(args.devices)
    quiet_bars()
    from jq.tasks.harness import TaskOptions, expand_names, harness_version, run_tasks

    options = TaskOptions(args.num_fewshot, args.limit, args.include_path)
    version = harness_version()
    # Unknown names are refused before the model is loaded.
    names = expand_names(split_names(args.tasks), options)

    from jq.models import Tokenizer
    from jq.tasks.lm import HarnessLM

    tokenizer = Tokenizer(folder)
    model, params = load_model(folder, mesh)
    with Meter("eval", every=5.0) as meter:
        lm = HarnessLM(model, params, tokenizer, batch_size=args.batch_size, progress=meter.show)
        results = run_tasks(lm, names, options)
    if lm.truncated:
        warn(
            f"{lm.truncated} requests were longer than the model's context of {lm.max_length} "
            "tokens and lost their beginning"
        )
    if args.json:
        facts = {"model": args.model, "harness": version, "limit": args.limit}
        facts |= {"truncated": lm.truncated, "tasks": [result.to_dict() for result in results]}
        print_json(facts)
    else:
        _print(results, version, args.limit)
    return 0


def quiet_bars() -> None:
    """Without a terminal, none of the harness's own progress bars; call it before its import."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # they would go between the lines of our meter
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _print(results: Sequence[Any], version: str, limit: int | None) -> None:
    rows = []
    for result in results:
        name = f"{result.name} (group)" if result.group else result.name
        shots = "" if result.num_fewshot is None else str(result.num_fewshot)
        for metric in result.metrics:
            label = metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"
            error = "" if metric.stderr is None else f"+- {metric.stderr:.4f}"
            better = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
            size = str(result.num_items)
            rows.append((name, shots, size, label, f"{metric.value:.4f}", error, better))
            name = shots = ""
    headers = ("task", "shots", "items", "metric", "value", "", "better")
    print_table(headers, rows, "lrrlrll")
    text = f"lm-evaluation-harness {version}; what follows a +- is one standard error"
    print(text)
    if limit is not None:
        note(f"only the first {limit} items of each task: no numbers to be reported")
