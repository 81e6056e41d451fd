"""The two stages of an arm: to make the quantized model, and to measure it.

Each is meant to run in a process of its own (`jq.compare.worker`): the peak memory that is then
reported belongs to it alone. Results are JSON values.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jq import tree
from jq.api import load
from jq.calib.tokens import CalibrationData
from jq.compare.arms import Arm
from jq.compare.quality import Stretches, position_edges
from jq.compare.store import load_tokens
from jq.compare.tasks import find_tasks, score_task
from jq.data_mesh import data_mesh
from jq.evaluate import evaluate
from jq.pipeline import quantize_checkpoint
from jq.prepare import prepare
from jq.qtensor import QTensor
from jq.tasks.harness import TaskOptions
from jq.tensor_parallel import unsharded

Stage = Literal["make", "measure"]
StageProgress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a stage needs to know; picklable.

    Attributes:
        stage: which one.
        arm: whose.
        model: folder of the original.
        folder: of the comparison, with its tokens; the arm's checkpoint is in arms/NAME.
        calibration: facts about the calibration tokens, for the checkpoint's manifest.
        meta: further facts for it.
        batch_size: windows that run at once.
        seq_len: of the evaluation.
        timing: {"batch_sizes", "prompt_tokens", "steps"}, or None.
        tasks: places and names of tasks, see `jq.compare.tasks`.
        task_options: how the harness's are run.
        alone: whether the process runs this stage only, so that its peak memory means something.
        devices: how many of the process's share the work.
    """

    stage: Stage
    arm: Arm
    model: Path
    folder: Path
    calibration: Mapping[str, Any] | None
    meta: Mapping[str, Any] | None
    batch_size: int
    seq_len: int
    timing: Mapping[str, Any] | None
    tasks: tuple[str, ...] = ()
    task_options: TaskOptions | None = None
    alone: bool = False
    devices: int = 1


def run_stage(job: Job, progress: StageProgress) -> dict[str, Any]:
    """Run it; raises whatever its work raises."""
    return make(job, progress) if job.stage == "make" else measure(job, progress)


def make(job: Job, progress: StageProgress) -> dict[str, Any]:
    """Quantize into the arm's checkpoint: seconds, peak memory, and errors per linear.

    A stopped run goes on where it was; its seconds are not those of the making then, but None.
    """
    report = quantize_checkpoint(
        job.model,
        job.folder / "arms" / job.arm.name,
        job.arm.recipe,
        _calibration(job) if job.arm.calibrated else None,
        batch_size=job.batch_size,
        overwrite=True,
        mesh=data_mesh(job.devices),
        progress=lambda p: progress(p.done, p.total, f"{p.block} {p.group}"),
        meta=job.meta,
    )
    names = ("path", "weight_error", "output_error", "rtn_output_error", "warnings")
    linears = [linear.to_dict() for linear in report.linears]
    return {
        "seconds": None if report.resumed else report.seconds,
        **_peaks(job.alone),
        "linears": [{name: linear[name] for name in names} for linear in linears],
    }


def measure(job: Job, progress: StageProgress) -> dict[str, Any]:
    """Load the arm's model: its size, speed, the memory that took, and its quality."""
    quantized = job.arm.spec is not None
    folder = job.folder / "arms" / job.arm.name if quantized else job.model
    progress(0, 1, "loading")
    mesh = data_mesh(job.devices, "model")
    model, params = load(folder, mesh=mesh)
    result: dict[str, Any] = {"size": _size(params, folder), "load": _load()}
    # From here on what inference runs on, so that its numbers and its memory are what is measured.
    params = prepare(params, dtype=model.dtype)
    result["speed"] = None if job.timing is None else _speed(model, params, job.timing, progress)
    # Before the original comes in as well.
    result["memory"] = _peaks(job.alone)
    reference = load(job.model, mesh=mesh)[1] if quantized else None
    tokens = load_tokens(job.folder)["evaluation"]
    stretches = Stretches(position_edges(job.seq_len))
    evaluation = evaluate(
        model,
        params,
        tokens,
        reference_params=reference,
        seq_len=job.seq_len,
        batch_size=job.batch_size,
        progress=lambda done, total: progress(done, total, "evaluating"),
        observe=stretches.observe,
    )
    result["quality"] = stretches.quality(evaluation.tokens_sha256).to_dict()
    del reference  # tasks are asked of the arm alone
    result["tasks"] = _tasks(job, model, params, progress)
    return result


def _calibration(job: Job) -> CalibrationData | None:
    arrays = load_tokens(job.folder)
    if "calibration" not in arrays:
        return None
    return CalibrationData(arrays["calibration"], arrays.get("mask"), dict(job.calibration or {}))


def _size(params: Any, folder: Path) -> dict[str, Any]:
    """Bits per weight of the blocks' linears, quantized or not; bytes of everything."""
    nbytes = weights = total = 0
    for path, leaf in tree.leaves(unsharded(params)):
        total += leaf.nbytes
        if path.startswith("layers_") and path.endswith("/kernel"):
            nbytes += leaf.nbytes
            weights += leaf.k * leaf.n if isinstance(leaf, QTensor) else leaf.size
    stored = [p for p in folder.rglob("*") if p.is_file()]
    if not (folder / "jaxq.json").is_file():  # of others' folders, what is read of them
        stored = [p for p in stored if p.suffix in (".safetensors", ".json")]
    return {
        "bits_per_weight": 8 * nbytes / weights,
        "weight_bytes": total,
        "disk_bytes": sum(p.stat().st_size for p in stored),
    }


def _load() -> list[float] | None:
    """Processes that want to run (the system's average of a minute) and the processors for them."""
    if not hasattr(os, "getloadavg"):
        return None
    return [os.getloadavg()[0], float(os.cpu_count() or 1)]


def _speed(
    model: Any, params: Any, timing: Mapping[str, Any], progress: StageProgress
) -> list[dict[str, Any]]:
    from jq.bench import measure_decode

    result = measure_decode(
        model,
        params,
        batch_sizes=tuple(timing["batch_sizes"]),
        prompt_tokens=timing["prompt_tokens"],
        steps=timing["steps"],
        progress=lambda done, total, text: progress(done, total, f"timing {text}".strip()),
    )
    return [
        {**batch.to_dict(), "decode_step_seconds": list(batch.decode.seconds)}
        for batch in result.batches
    ]


def _tasks(job: Job, model: Any, params: Any, progress: StageProgress) -> dict[str, list[float]]:
    if not job.tasks:
        return {}
    from jq.models import Tokenizer

    tokenizer, scores = Tokenizer(job.model), {}
    for task in find_tasks(job.tasks, job.task_options):
        title = f"task {task.name}"
        progress(0, 1, title)
        scores[task.name] = score_task(
            task,
            model,
            params,
            tokenizer,
            job.batch_size,
            lambda done, total, text, title=title: progress(done, total, f"{title}: {text}"),
        )
    return scores


def _peaks(alone: bool) -> dict[str, int | None]:
    """Highest memory use of the process so far, in bytes; None where it is not this stage's own."""
    if not alone:
        return {"peak_host_bytes": None, "peak_device_bytes": None}
    try:
        import resource  # not there on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:
        host = None
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"peak_host_bytes": host, "peak_device_bytes": int(np.max(used)) if used else None}
