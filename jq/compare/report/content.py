"""What a report says, in the order of its parts; Markdown and HTML are two ways to write it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jq.compare.arms import unfair_pairs
from jq.compare.decision import Budget, Decision
from jq.compare.report.tables import (
    Table,
    length_table,
    position_table,
    quality_table,
    size_table,
    speed_table,
    task_table,
)
from jq.compare.results import Comparison


@dataclasses.dataclass(frozen=True)
class Content:
    """The words and tables of a report."""

    title: str
    setting: str
    verdict: tuple[str, ...]
    failures: tuple[str, ...]
    unfair: tuple[str, ...]
    tables: tuple[Table, ...]
    arms: Table
    facts: Table
    cautions: tuple[str, ...]


def content(comparison: Comparison, decision: Decision, budget: Budget) -> Content:
    """Collect it."""
    arms = [r.arm for r in comparison.results]
    tables = (
        quality_table(comparison),
        task_table(comparison),
        length_table(comparison),
        position_table(comparison),
        size_table(comparison),
        speed_table(comparison),
    )
    rows = tuple(
        (r.name, r.arm.summary, _rule(r.arm.spec, r.arm.method)) for r in comparison.results
    )
    return Content(
        title=f"Quantization of {comparison.spec['model']['name']}: which method?",
        setting=_setting(comparison.spec),
        verdict=(
            decision.verdict,
            *((decision.bound,) if decision.bound else ()),
            *decision.reasons,
            f"Budget: {_budget(budget)}.",
        ),
        failures=tuple(f"{r.name} FAILED: {r.error}" for r in comparison.failed),
        unfair=tuple(f"Unfair pair: {a} against {b}. {why}." for a, b, why in unfair_pairs(arms)),
        tables=tuple(table for table in tables if table is not None),
        arms=Table("Methods", ("method", "what it does", "options"), "lll", rows),
        facts=_facts(comparison),
        cautions=_CAUTIONS,
    )


_CAUTIONS = (
    "These numbers are of this model, text, calibration set, machine and version; they do not "
    "carry over to others, nor to other engines and kernels.",
    "Calibration text that is far from what the model will read costs quality.",
    "Perplexity does not always follow what users do with a model: reasoning and code lose more "
    "than easy tasks. Lengths beyond those in the table were not measured.",
    "Weights of 4 bits save time where memory limits it, at small batches; how long a model took "
    "to make says nothing about how fast it runs.",
)


def _setting(spec: Mapping[str, Any]) -> str:
    evaluation, numbers, device = spec["evaluation"], spec["numbers"], spec["device"]
    text = (
        f"Measured on {evaluation['windows']} windows of {evaluation['seq_len']} tokens of "
        f"{evaluation['text']}, token level. Weight-only methods have {numbers['bits']} bits in "
        f"groups of {numbers['group_size']}, "
        f"{'symmetric' if numbers['symmetric'] else 'with zero points'}."
    )
    calibration = spec["calibration"]
    if calibration and {"samples", "seq_len", "source"} <= set(calibration):
        text += (
            f" Calibration: {calibration['samples']} samples of {calibration['seq_len']} tokens of "
            f"{calibration['source']}."
        )
    return f"{text} Machine: {_device(device)}, JAX {spec['versions']['jax']}."


def _device(device: Mapping[str, Any]) -> str:
    used = f"{device['used']} of " if "used" in device else ""
    if device["platform"] == "cpu":
        cores = device["cores"]
        shared = f", {used}{device['count']} devices" if used else ""
        return f"{cores} core{'s' if cores > 1 else ''} of {device['kind']}{shared}"
    return f"{used}{device['count']} x {device['kind']}"


def _budget(budget: Budget) -> str:
    share = f"{100 * budget.max_ppl_increase:g} % of the original's"
    text = "perplexity may rise by " + (
        share if budget.relative else f"{budget.max_ppl_increase:g}"
    )
    if budget.max_task_drop is not None:
        text += f", a task may lose {100 * budget.max_task_drop:g} points in a hundred"
    return text


def _rule(spec: Any, method: Any) -> str:
    return "" if spec is None else f"{spec}, {method}"


def _facts(comparison: Comparison) -> Table:
    rows = (("spec hash", comparison.spec_hash), *_leaves(comparison.spec))
    return Table("What all arms share", ("fact", "value"), "ll", rows)


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        name = f"{path}.{key}" if path else key
        if isinstance(item, Mapping):
            yield from _leaves(item, name)
        else:
            yield name, item if isinstance(item, str) else json.dumps(item)
