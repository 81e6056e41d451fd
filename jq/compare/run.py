"""`compare`: every arm quantized, measured and kept, the finished ones of an earlier run reused.

arms = find_arms(("awq", "gptq"), numbers)
plan = Plan(model, out, arms, numbers, tokens, 2048, "held-out.txt", calibration=data)
comparison = compare(plan)
comparison.rows(), decide(comparison, Budget.parse("1%"), objective="size")
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jq.calib.tokens import CalibrationData
from jq.checkpoint import files
from jq.compare.arms import ORIGINAL, Arm, Numbers
from jq.compare.results import ArmResult, Comparison
from jq.compare.spec import ComparisonSpec, device_facts, model_digest, versions
from jq.compare.stages import Job, Stage, run_stage
from jq.compare.store import DONE, FAILED, Store
from jq.compare.tasks import describe as describe_tasks
from jq.compare.tasks import find_tasks
from jq.compare.worker import ArmError, describe, device_apart, run_apart
from jq.data_mesh import checked_count
from jq.errors import CalibrationError, SpecError
from jq.evaluate.run import cut_windows
from jq.models import HFCheckpoint
from jq.pipeline import check_run
from jq.tasks.harness import TaskOptions


@dataclasses.dataclass(frozen=True)
class Timing:
    """What is timed: random prompts of so many tokens, and so many decode steps."""

    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 128
    steps: int = 200

    def __post_init__(self) -> None:
        numbers = (*self.batch_sizes, self.prompt_tokens, self.steps)
        if not self.batch_sizes or min(numbers) < 1:
            raise SpecError(f"{self}: give batch sizes and counts of 1 or more")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A comparison to run.

    Attributes:
        model: folder of the original.
        out: folder for everything; made, or one of the same comparison.
        arms: the original first, see `jq.compare.arms`.
        numbers: what the arms were made of.
        tokens: to evaluate on, integers `[N]`.
        seq_len, max_windows: see `jq.evaluate.evaluate`.
        text: name of the evaluation text.
        words_per_token: of that text, for a perplexity per word; None where it is not known.
        calibration: None where no arm learns.
        batch_size: windows that run at once, in calibration and evaluation.
        timing: None to time nothing.
        tasks: "module:object" of the user's, names of lm-evaluation-harness's, see
            `jq.compare.tasks`.
        task_options: how the harness's are run.
        meta: further facts for the checkpoints' manifests.
        keep_checkpoints: whether the quantized models stay.
        apart: run every stage in a process of its own; then its peak memory is known, and one that
            is killed fails alone.
        devices: how many share the making of a model, and have it cut over them when it is
            measured; "all", or None for one.
    """

    model: Path
    out: Path
    arms: tuple[Arm, ...]
    numbers: Numbers
    tokens: np.ndarray
    seq_len: int
    text: str
    max_windows: int | None = None
    words_per_token: float | None = None
    calibration: CalibrationData | None = None
    batch_size: int = 1
    timing: Timing | None = None
    tasks: tuple[str, ...] = ()
    task_options: TaskOptions | None = None
    meta: Mapping[str, Any] | None = None
    keep_checkpoints: bool = True
    apart: bool = True
    devices: int | Literal["all"] | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """Progress: `done` of `total` steps of a stage of arm number `index` (from 0) of `count`."""

    arm: str
    index: int
    count: int
    stage: str
    done: int
    total: int
    text: str


def compare(
    plan: Plan,
    *,
    progress: Callable[[Step], None] | None = None,
    finished: Callable[[ArmResult], None] | None = None,
) -> Comparison:
    """Run the missing arms, one after another.

    An arm that fails is kept as FAILED and tried again by the next run; the others go on.

    Args:
        plan: what to do.
        progress: called as work goes on.
        finished: called with every arm's result, reused ones too.
    Raises: before anything is computed,
        SpecError, ModelError: an arm that does not fit the model; a task that cannot be had; more
            devices than there are.
        CalibrationError: arms that learn, and no calibration data; too short a text.
        OutputError: the folder is in use, or holds something else or results of another spec.
    """
    windows = cut_windows(plan.tokens, plan.seq_len, plan.max_windows)
    _check(plan)
    tasks = describe_tasks(plan.tasks, find_tasks(plan.tasks, plan.task_options))
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(Path(os.path.realpath(plan.out))):
        store = Store(plan.out, _spec(plan, windows, tasks, progress))
        # All of them first: a result that must not be merged is refused before the long run.
        kept = {arm.name: store.result(arm) for arm in plan.arms}
        store.write_tokens(plan.calibration, windows)
        results = []
        for index, arm in enumerate(plan.arms):
            raw = kept[arm.name]
            result = ArmResult(arm, raw or _run_arm(plan, store, index, progress), raw is not None)
            results.append(result)
            if finished is not None:
                finished(result)
    return Comparison(store.spec.to_dict(), store.hash, tuple(results))


def _check(plan: Plan) -> None:
    if not plan.arms or plan.arms[0].name != ORIGINAL:
        raise SpecError(
            f"the first arm must be {ORIGINAL!r}, against which the others are measured"
        )
    names = [arm.name for arm in plan.arms]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SpecError(f"arms of one name: {', '.join(sorted(twice))}")
    context = HFCheckpoint(plan.model).config.max_position_embeddings
    if plan.timing is not None and plan.timing.prompt_tokens + 2 > context:
        raise SpecError(
            f"prompt_tokens {plan.timing.prompt_tokens} leaves no room to decode in the model's "
            f"context of {context}; give {context - 2} or less"
        )
    for arm in plan.arms[1:]:
        check_run(plan.model, plan.out / "arms" / arm.name, arm.recipe, overwrite=True)
        if arm.calibrated and plan.calibration is None:
            raise CalibrationError(f"{arm.name} learns from calibration data, and none was given")


def _spec(
    plan: Plan,
    windows: np.ndarray,
    tasks: Mapping[str, Any],
    progress: Callable[[Step], None] | None,
) -> ComparisonSpec:
    def reading(done: int, total: int, file: str) -> None:
        if progress is not None:
            progress(Step(ORIGINAL, 0, len(plan.arms), "digest", done, total, file))

    device = _device(plan)  # which may refuse, before a large model is read
    return ComparisonSpec(
        model=model_digest(plan.model, reading),
        numbers=dataclasses.asdict(plan.numbers),
        calibration=None if plan.calibration is None else dict(plan.calibration.description),
        evaluation={
            "text": plan.text,
            "sha256": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
            "seq_len": plan.seq_len,
            "windows": len(windows),
            "words_per_token": plan.words_per_token,
        },
        timing=None if plan.timing is None else dataclasses.asdict(plan.timing),
        tasks=tasks,
        batch_size=plan.batch_size,
        versions=versions(),
        device=device,
    )


def _device(plan: Plan) -> dict[str, Any]:
    """Facts of the device; "used" is how many of several, where it is not one."""
    facts = _device_facts(plan)
    asked = 1 if plan.devices is None else plan.devices
    used = checked_count(asked, facts["count"], facts["platform"])
    return facts if used == 1 else facts | {"used": used}


def _device_facts(plan: Plan) -> dict[str, Any]:
    if not plan.apart:
        return device_facts()
    log = plan.out.with_name(f".{plan.out.name}.device-{os.getpid()}.log")
    try:
        return device_apart(log)
    finally:
        log.unlink(missing_ok=True)


def _run_arm(
    plan: Plan, store: Store, index: int, progress: Callable[[Step], None] | None
) -> dict[str, Any]:
    arm = plan.arms[index]
    result: dict[str, Any] = {"status": DONE, "error": None, "made": None}
    store.log(arm).unlink(missing_ok=True)
    try:
        if arm.spec is not None:
            made = store.made(arm)
            if made is None:
                made = _stage(plan, store, index, "make", progress)
                store.write_made(arm, made)
            result["made"] = made
        result |= _stage(plan, store, index, "measure", progress)
    except ArmError as error:
        return store.write_result(arm, {"status": FAILED, "error": str(error)})
    whole = store.write_result(arm, result)
    if not plan.keep_checkpoints:
        store.discard(arm)
    return whole


def _stage(
    plan: Plan, store: Store, index: int, stage: Stage, progress: Callable[[Step], None] | None
) -> dict[str, Any]:
    """The stage's result; ArmError for whatever goes wrong in it."""
    arm = plan.arms[index]
    job = Job(
        stage,
        arm,
        plan.model,
        plan.out,
        None if plan.calibration is None else plan.calibration.description,
        plan.meta,
        plan.batch_size,
        plan.seq_len,
        None if plan.timing is None else dataclasses.asdict(plan.timing),
        plan.tasks,
        plan.task_options,
        plan.apart,
        store.spec.device.get("used", 1),
    )

    def show(done: int, total: int, text: str) -> None:
        if progress is not None:
            progress(Step(arm.name, index, len(plan.arms), stage, done, total, text))

    if plan.apart:
        return run_apart(job, store.log(arm), show)
    try:
        return run_stage(job, show)
    except Exception as error:
        raise ArmError(describe(error)) from error
