"""A run on a model folder, and whether it fits here."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax

from jq.journal import journal_folder
from jq.models import Decoder, HFCheckpoint
from jq.models.hf_names import weight_table
from jq.recipe import Recipe
from jq.requirements.machine import Machine, check, machine
from jq.requirements.memory import Requirements, requirements
from jq.requirements.workload import Run, run_of


def run_of_checkpoint(
    source: HFCheckpoint,
    recipe: Recipe,
    tokens: tuple[int, int] | None,
    *,
    batch_size: int = 1,
    offload: bool = False,
    target: str = "orbax",
    devices: int = 1,
) -> Run:
    """The run that `jq.pipeline.quantize_checkpoint` would make of these arguments.

    Args:
      source: the opened model; headers only are read.
      recipe: see `jq.recipe`.
      tokens: (samples, length) of the calibration set; None where nothing is calibrated.
      batch_size, offload, target: of `quantize_checkpoint`.
      devices: of its mesh, those that share the work.
    """
    config, table = source.config, weight_table(source.config)
    model = Decoder(config)
    parameters = sum(math.prod(entry.shape) for entry in table)
    stored = max(1, round(sum(file.stat().st_size for file in source.files) / parameters))
    return run_of(
        model.block_names,
        model.linear_groups,
        {entry.path: entry.shape for entry in table},
        recipe,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        tokens=tokens,
        stored_bytes=stored,
        compute_bytes=4 if jax.default_backend() == "cpu" else stored,  # as `compute_dtype`
        batch_size=batch_size,
        offload=offload,
        copies=1 if target == "orbax" else 2,
        devices=devices,
    )


def check_resources(
    run: Run, out: str | os.PathLike[str], there: Machine | None = None
) -> tuple[Requirements, Machine]:
    """What the run needs and what there is.

    Args:
      run: see `run_of_checkpoint`.
      out: where it will write; what an unfinished run has left there counts as written.
      there: None asks the machine.
    Raises: ResourceError, OutputError; see `jq.requirements.machine.check`.
    """
    target = Path(os.path.realpath(out))
    needed, there = requirements(run), machine(target) if there is None else there
    check(run, needed, there, target, on_disk=_folder_bytes(journal_folder(target)))
    return needed, there


def _folder_bytes(folder: Path) -> int:
    total = 0
    for entry in folder.rglob("*") if folder.is_dir() else ():
        info: Any = entry.lstat()
        total += info.st_size if entry.is_file() and not entry.is_symlink() else 0
    return total
