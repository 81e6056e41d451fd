"""Finding and running tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jq.errors import SpecError
from jq.tasks.results import TaskResult, read_results

# Resamples for the few metrics whose standard error has no formula (perplexities, F1 of classes).
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    Attributes:
        num_fewshot: solved examples in each prompt; each task's own number when None, and for
            tasks that insist on none.
        limit: take the first items of each task only.
        include_path: folder with further tasks (YAML files), which come before the harness's own.
        seed: of the choice of solved examples; the harness's own default.

    Raises: SpecError for numbers that make no sense, or a folder that is not there.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    include_path: str | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise SpecError(f"num_fewshot {self.num_fewshot} must be 0 or more")
        if self.limit is not None and self.limit < 1:
            raise SpecError(f"limit {self.limit} must be 1 or more")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise SpecError(f"include_path {self.include_path} is no folder")


def harness_version() -> str:
    """Of lm-evaluation-harness; SpecError, which says how to get it, where it is missing."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise SpecError(
            f"tasks need lm-evaluation-harness ({error.name} is missing); install it with: "
            'pip install "lm-eval>=0.4.13,<0.5" (the extra "tasks")'
        ) from error
    return version("lm_eval")


def load_tasks(names: Sequence[str], options: TaskOptions) -> dict[str, Any]:
    """name -> the harness's tasks behind it; a group has several. Reads (or downloads) their data.

    Args:
        names: of tasks, groups or tags, patterns of them ("mmlu_*"), or YAML files.
        options: where else to look.
    Raises: SpecError for an unknown name, with names that are close; for data that cannot be had;
        for tasks with images, or that run what a model writes.
    """
    return {name: list(loaded["tasks"].values()) for name, loaded in _load(names, options).items()}


def expand_names(names: Sequence[str], options: TaskOptions) -> tuple[str, ...]:
    """The names with patterns written out, each once.

    Raises: SpecError for names that nothing has.
    """
    if not names:
        raise SpecError("no task is named")
    manager = _manager(tuple(names), options)
    found: dict[str, None] = {}
    for name in names:
        if name in manager.task_index or _is_file(name):
            matches = [name]
        else:
            matches = manager.match_tasks([name]) if set(name) & set("*?[") else []
        if not matches:
            raise SpecError(f"no task is called {name!r}{_close(name, manager.all_tasks)}")
        found |= dict.fromkeys(matches)
    return tuple(found)


def run_tasks(lm: Any, names: Sequence[str], options: TaskOptions) -> tuple[TaskResult, ...]:
    """Run tasks and score them, as the harness's own command does.

    Args:
        lm: a `HarnessLM`.
        names, options: see `load_tasks`.
    Returns: tasks, groups and their members, in the harness's order.
    Raises: SpecError as `load_tasks`; whatever the model raises.
    """
    whole: Any = {"tasks": {}, "groups": {}, "group_map": {}}
    for loaded in _load(names, options).values():
        for part, found in loaded.items():
            whole[part] |= found
    for task in whole["tasks"].values():
        _set_shots(task, options)
    from lm_eval.evaluator import evaluate

    with _quiet(), _seeded():
        raw = evaluate(lm, whole, limit=options.limit, bootstrap_iters=_RESAMPLES)
    if raw is None:
        raise SpecError("this process is not the first of a launched group; run it alone")
    return read_results(raw)


def describe_tasks(tasks: Sequence[Any], options: TaskOptions) -> dict[str, Any]:
    """JSON facts that fix what is asked: each task's version, prompts, number of items and their
    sha256."""
    facts: dict[str, Any] = {"num_fewshot": options.num_fewshot, "limit": options.limit}
    facts["seed"] = options.seed
    for task in tasks:
        docs = list(task.eval_docs)[: options.limit]
        content = {"config": _config(task), "docs": docs}
        text = json.dumps(content, sort_keys=True, default=repr)
        facts[task.task_name] = {
            "version": task.VERSION,
            "items": len(docs),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    return facts


def mean_metrics(task: Any) -> list[str]:
    """Names of the task's metrics that are means over items, where more is better."""
    better = task.higher_is_better()
    return [
        name
        for name, how in task.aggregation().items()
        if getattr(how, "__name__", "") == "mean" and better.get(name, True)
    ]


def _load(names: Sequence[str], options: TaskOptions) -> dict[str, dict[str, Any]]:
    """name -> the harness's {"tasks", "groups", "group_map"}; see `load_tasks`."""
    manager, found = _manager(tuple(names), options), {}
    with _quiet(), _seeded():
        for name in expand_names(names, options):
            try:
                found[name] = manager.load([name])
            except Exception as error:  # whatever the data's hosts, files and scripts raise
                raise SpecError(
                    f"task {name!r} cannot be loaded: {_short(error)}; its data must be in reach "
                    "(the network, or what was downloaded before), or be files of yours"
                ) from error
    for loaded in found.values():
        for name, task in loaded["tasks"].items():
            _check_kind(name, task)
    return found


def _check_kind(name: str, task: Any) -> None:
    """Raise SpecError for tasks that language models of ours cannot or shall not do."""
    if getattr(task, "UNSAFE_CODE", False):
        raise SpecError(f"task {name!r} runs programs that the model writes, which we do not")
    if getattr(task, "MULTIMODAL", False):
        raise SpecError(f"task {name!r} shows images or sounds, which our models do not take")


def _set_shots(task: Any, options: TaskOptions) -> None:
    """Solved examples in the prompts, as the harness's command sets them."""
    own = task.get_config("num_fewshot")
    if options.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=options.seed)


def _config(task: Any) -> dict[str, Any]:
    """What of a task's definition is text and numbers; functions by name, folders not at all."""
    config: Mapping[str, Any] = task.dump_config() if hasattr(task, "dump_config") else {}
    plain = {}
    for key, value in config.items():
        if key not in ("dataset_kwargs", "metadata"):
            plain[key] = getattr(value, "__name__", value)
    return plain


@functools.cache
def _manager_of(include_path: str | None, include_defaults: bool) -> Any:
    harness_version()
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _manager(names: tuple[str, ...], options: TaskOptions) -> Any:
    """Finds tasks. To read all the harness's own takes seconds, so only where they are needed."""
    if all(map(_is_file, names)):
        return _manager_of(options.include_path, False)
    if options.include_path is not None:
        manager = _manager_of(options.include_path, False)
        if all(_is_file(name) or _is_whole(name, manager) for name in names):
            return manager
    return _manager_of(options.include_path, True)


def _is_whole(name: str, manager: Any) -> bool:
    """Whether a task, or a group with all its members, is known here. A tag may have more
    elsewhere."""
    if name in manager.all_groups:
        members = (manager.task_index[name].cfg or {}).get("task") or ()
        return all(isinstance(m, str) and _is_whole(m, manager) for m in members)
    return name in manager.all_subtasks


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _close(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    return f"; close: {', '.join(near)}" if near else "; nothing known is close"


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness without its own log and prints, and without forks, which JAX does not survive."""
    logger = logging.getLogger("lm_eval")
    level, before = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The global generators as the harness's command seeds them: some tasks draw when they load."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
