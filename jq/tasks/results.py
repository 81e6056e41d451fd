"""What tasks tell: values with standard errors, and scores item by item."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Which metric stands for a task, where there are several; the first one that it has.
PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "em")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of a task.

    Attributes:
        name: the harness's, such as "acc_norm".
        filter: what is done to the answers first; "none" for nothing.
        value, stderr: stderr None where the harness has no estimate.
        higher_is_better: None where the task does not say.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None

    @property
    def key(self) -> str:
        """As the harness writes it: "acc,none"."""
        return f"{self.name},{self.filter}"


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task, or a group of tasks.

    Attributes:
        name: the harness's.
        version: of the task's definition; None for groups without one.
        num_fewshot: solved examples in each prompt; None for a group.
        num_items: how many were asked.
        metrics: in the task's order.
        items: key of a metric -> the value of each item, in order; where it has one number each.
        group: whether it is a group, which sums tasks up.
    """

    name: str
    version: Any
    num_fewshot: int | None
    num_items: int
    metrics: tuple[Metric, ...]
    items: Mapping[str, Sequence[float]]
    group: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "task": self.name,
            "version": self.version,
            "num_fewshot": self.num_fewshot,
            "num_items": self.num_items,
            "group": self.group,
            "metrics": [dataclasses.asdict(metric) for metric in self.metrics],
            "items": {key: list(values) for key, values in self.items.items()},
        }


def read_results(raw: Mapping[str, Any]) -> tuple[TaskResult, ...]:
    """Of what the harness's `simple_evaluate` returns: tasks and groups, in its order."""
    groups = raw.get("groups") or {}
    return tuple(
        _task(name, values, raw, name in groups) for name, values in raw["results"].items()
    )


def choose_metric(items: Mapping[str, Sequence[float]]) -> str | None:
    """The key of the metric that stands for a task by its items' scores: the first of `PREFERRED`,
    else the first whose values are all in [0, 1]; None without any."""
    fit = [key for key, x in items.items() if x and all(0 <= value <= 1 for value in x)]
    for name in PREFERRED:
        for key in fit:
            if key.partition(",")[0] == name:
                return key
    return next(iter(fit), None)


def _task(name: str, values: Mapping[str, Any], raw: Mapping[str, Any], group: bool) -> TaskResult:
    better = (raw.get("higher_is_better") or {}).get(name) or {}
    metrics = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        metrics.append(
            Metric(
                metric,
                filtered,
                float(value),
                _number(values.get(f"{metric}_stderr,{filtered}")),
                better.get(metric),
            )
        )
    counts = (raw.get("n-samples") or {}).get(name) or {}
    samples = (raw.get("samples") or {}).get(name) or []
    items = read_items(samples)
    asked = counts.get("effective") or max(map(len, items.values()), default=0)
    return TaskResult(
        name,
        (raw.get("versions") or {}).get(name),
        (raw.get("n-shot") or {}).get(name),
        int(asked or values.get("sample_count") or 0) if not group else _size(values),
        tuple(metrics),
        items,
        group,
    )


def read_items(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """ "metric,filter" -> one number per item, of the harness's logged samples.

    Metrics whose items are no single numbers (perplexities, say) are left out.
    """
    items: dict[str, list[float]] = {}
    broken = set()
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        for name in sample["metrics"]:
            key, value = f"{name},{sample['filter']}", _number(sample.get(name))
            if value is None:
                broken.add(key)
            else:
                items.setdefault(key, []).append(value)
    return {key: values for key, values in items.items() if key not in broken}


def _size(values: Mapping[str, Any]) -> int:
    count = values.get("sample_len") or values.get("sample_count") or 0
    return sum(count.values()) if isinstance(count, Mapping) else int(count)


def _number(value: Any) -> float | None:
    """Of Python's and NumPy's numbers; None for anything else, and for no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
