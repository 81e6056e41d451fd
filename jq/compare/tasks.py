"""Tasks of the user, scored item by item: the place where any harness can be put in.

A task is an object, named on the command line as "module:object", with a name and a function that
answers with one number in [0, 1] per item. Items are what arms are compared by, in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jq.errors import SpecError


@runtime_checkable
class Task(Protocol):
    """What a task offers."""

    name: str

    def score(self, model: Any, params: Any, tokenizer: Any) -> Sequence[float]:
        """One number in [0, 1] per item, always for the same items in the same order.

        model, params: as of `jq.load`. tokenizer: a `jq.models.Tokenizer`.
        """
        ...


def find_task(place: str) -> Task:
    """The task at "module:object".

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


def score_task(task: Task, model: Any, params: Any, tokenizer: Any) -> list[float]:
    """The scores of the items, checked.

    Raises: SpecError for anything but numbers in [0, 1].
    """
    scores = np.asarray(task.score(model, params, tokenizer), np.float64)
    if scores.ndim != 1 or not scores.size or not np.all((scores >= 0) & (scores <= 1)):
        raise SpecError(
            f"task {task.name}: scores {scores.shape} are not one number in [0, 1] per item"
        )
    return scores.tolist()
