"""Tasks, scored item by item: those of lm-evaluation-harness by name, and the user's own objects.

A task answers with one number in [0, 1] per item. Items are what arms are compared by, in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jq.errors import SpecError
from jq.tasks.harness import (
    TaskOptions,
    describe_tasks,
    harness_version,
    load_tasks,
    mean_metrics,
    run_tasks,
)
from jq.tasks.results import PREFERRED, TaskResult

Progress = Callable[[int, int, str], None]


@runtime_checkable
class Task(Protocol):
    """What a task of the user's offers, which is named on the command line as "module:object"."""

    name: str

    def score(self, model: Any, params: Any, tokenizer: Any) -> Sequence[float]:
        """One number in [0, 1] per item, always for the same items in the same order.

        model, params: as of `jq.load`. tokenizer: a `jq.models.Tokenizer`.
        """
        ...


class HarnessTask:
    """A task or a group of lm-evaluation-harness; a group's items are those of its tasks.

    Args:
        place: the harness's name for it, or a YAML file.
        tasks: what `jq.tasks.load_tasks` found behind it.
        options: how it is run.

    Attributes:
        name: "arc_easy (acc_norm)": the task, and the metric that stands for it; see
            `jq.tasks.results.PREFERRED`.
        facts: JSON values that fix what is asked, for the comparison's spec.

    Raises: SpecError for tasks without a metric that is a mean over items.
    """

    def __init__(self, place: str, tasks: Sequence[Any], options: TaskOptions) -> None:
        self._place, self._options = place, options
        self._members = [task.task_name for task in tasks]
        self._metric = _shared_metric(place, tasks)
        self.name = f"{place.rpartition('/')[2]} ({self._metric})"
        self.facts = {
            "harness": harness_version(),
            "metric": self._metric,
            **describe_tasks(tasks, options),
        }

    def score(
        self,
        model: Any,
        params: Any,
        tokenizer: Any,
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> list[float]:
        """The metric of every item, the tasks one after another."""
        from jq.tasks.lm import HarnessLM

        lm = HarnessLM(model, params, tokenizer, batch_size=batch_size, progress=progress)
        results = {r.name: r for r in run_tasks(lm, (self._place,), self._options)}
        return [x for name in self._members for x in self._items(results[name])]

    def _items(self, result: TaskResult) -> Sequence[float]:
        for key, scores in result.items.items():
            if key.partition(",")[0] == self._metric:
                return scores
        raise SpecError(f"task {result.name} has no {self._metric} of its items")


def find_tasks(places: Sequence[str], options: TaskOptions | None = None) -> list[Any]:
    """Tasks at "module:object", and the harness's by their names, in this order.

    Raises: SpecError for a place or name where none is.
    """
    own = [find_task(place) for place in places if ":" in place]
    names = [place for place in places if ":" not in place]
    if not names:
        return own
    options = TaskOptions() if options is None else options
    loaded = load_tasks(names, options)
    return own + [HarnessTask(name, tasks, options) for name, tasks in loaded.items()]


def find_task(place: str) -> Task:
    """The user's task at "module:object".

    Raises: SpecError for a place where none is.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise SpecError(f"task {place!r}: name it as module:object, which has name and score()")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"task {place!r} cannot be imported: {error}") from error
    if not isinstance(found, Task):
        raise SpecError(f"task {place!r} is a {type(found).__name__} without name and score()")
    return found


def describe(places: Sequence[str], tasks: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """What a comparison's spec says of its tasks: names, and facts about the harness's."""
    own: dict[str, Mapping[str, Any]] = {place: {} for place in places if ":" in place}
    return own | {task.name: task.facts for task in tasks if isinstance(task, HarnessTask)}


def score_task(
    task: Any,
    model: Any,
    params: Any,
    tokenizer: Any,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[float]:
    """The scores of the items, checked.

    Raises: SpecError for anything but numbers in [0, 1].
    """
    if isinstance(task, HarnessTask):
        answers = task.score(model, params, tokenizer, batch_size, progress)
    else:
        answers = task.score(model, params, tokenizer)
    scores = np.asarray(answers, np.float64)
    if scores.ndim != 1 or not scores.size or not np.all((scores >= 0) & (scores <= 1)):
        raise SpecError(
            f"task {task.name}: scores {scores.shape} are not one number in [0, 1] per item"
        )
    return scores.tolist()


def _shared_metric(place: str, tasks: Sequence[Any]) -> str:
    """The preferred metric among those that all of the tasks have."""
    each = [mean_metrics(task) for task in tasks]
    shared = [name for name in (each[0] if each else []) if all(name in names for names in each)]
    ordered = [name for name in PREFERRED if name in shared] + shared
    if not ordered:
        raise SpecError(
            f"task {place!r} has no score per item to compare methods by; `jaxq eval --tasks` "
            "tells what it measures"
        )
    return ordered[0]
