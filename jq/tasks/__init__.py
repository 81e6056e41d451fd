"""Tasks of lm-evaluation-harness on a model of ours: what people mean by "accuracy on ARC".

results = run_tasks(HarnessLM(model, params, tokenizer), ("arc_easy", "hellaswag"), TaskOptions())
for task in results:
    for metric in task.metrics:
        print(task.name, metric.name, metric.value, metric.stderr)

The harness (the extra "tasks") chooses the items, writes the prompts and scores the
answers; log-likelihoods and texts are computed here.  It is imported when a task is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jq.tasks.results import Metric, TaskResult

if TYPE_CHECKING:
    from jq.tasks.harness import TaskOptions as TaskOptions
    from jq.tasks.harness import load_tasks as load_tasks
    from jq.tasks.harness import run_tasks as run_tasks
    from jq.tasks.lm import HarnessLM as HarnessLM

_PLACES = {
    "HarnessLM": "jq.tasks.lm",
    "TaskOptions": "jq.tasks.harness",
    "load_tasks": "jq.tasks.harness",
    "run_tasks": "jq.tasks.harness",
}

__all__ = ["HarnessLM", "Metric", "TaskOptions", "TaskResult", "load_tasks", "run_tasks"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
