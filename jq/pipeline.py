"""From a model folder to a quantized checkpoint, or a folder for other tools, a block at a time.

report = quantize_checkpoint("path/to/model", "path/to/out", default_recipe(), calibration)

Memory holds one block, its statistics and the hidden states of the calibration set, whatever the
model's depth: weights are read when a block's turn comes and are written when it is finished. A
run that was stopped goes on with the first unfinished block, to the same bytes (`jq.journal`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from jq import tree
from jq.api import compute_dtype
from jq.calib.driver import quantize_blocks
from jq.calib.report import BlockReport, LinearReport, ProgressCallback
from jq.calib.tokens import CalibrationData
from jq.checkpoint import CheckpointWriter, files, is_checkpoint
from jq.checkpoint.manifest import library_versions
from jq.cuts import CutRule
from jq.data_mesh import checked_mesh, mesh_fact
from jq.distributed import Team, all_devices
from jq.errors import CalibrationError, CheckpointError, NonFiniteError, OutputError
from jq.formats.export import ExportWriter
from jq.formats.plan import ExportFormat, FormatOptions, Scheme, plan_of_recipe, schemes_for
from jq.formats.shards import SHARD_BYTES
from jq.interrupts import held_back
from jq.journal import Journal, device_facts
from jq.models import Decoder, HFCheckpoint, ModelConfig
from jq.models.hf_names import weight_table
from jq.models.hf_weights import place_on_host
from jq.preflight import check_gpu, check_recipe
from jq.recipe import Method, Recipe, needs_calibration
from jq.requirements.of_checkpoint import check_resources, run_of_checkpoint


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What a run did.

    path: the checkpoint it made.
    blocks: a report per block.
    seconds: from the first weight read to the folder in its place.
    resumed: blocks that an earlier run had finished.
    """

    path: Path
    blocks: tuple[BlockReport, ...]
    seconds: float
    resumed: int = 0

    @property
    def linears(self) -> tuple[LinearReport, ...]:
        """Every quantized linear, in order."""
        return tuple(linear for block in self.blocks for linear in block.linears)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready contents of report.json.  Without times: equal runs write equal files."""
        return {
            "blocks": [
                {"name": block.name, "linears": [linear.to_dict() for linear in block.linears]}
                for block in self.blocks
            ]
        }


def quantize_checkpoint(
    model_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    calibration: CalibrationData | None = None,
    *,
    batch_size: int = 1,
    offload: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    unchecked: bool = False,
    mesh: Mesh | None = None,
    axis: str = "data",
    progress: ProgressCallback | None = None,
    meta: Mapping[str, Any] | None = None,
    target: Literal["orbax"] | ExportFormat = "orbax",
    options: FormatOptions | None = None,
    shard_bytes: int = SHARD_BYTES,
    target_gpu: str | None = None,
    allow_reference: bool = False,
) -> RunReport:
    """Quantize a Hugging Face model folder into a jaxq checkpoint, or for another tool.

    Every process of a program of several (see `jq.distributed`) calls this with the same arguments;
    `out` lies on a file system that all of them see, the model may be there or copied to each. The
    devices of all share the work, and each process writes its own shards.

    Args:
      model_path: config.json, safetensors weights and, where there are, the tokenizer's files.
      out: the folder to make; it appears complete or not at all.
      recipe: see `jq.recipe`.
      calibration: see `jq.calib.source`; None where no rule learns from it.
      batch_size: calibration samples on the device at a time where hidden states are offloaded.
      offload: keep the hidden states of the calibration set in host memory.
      overwrite: replace an existing folder that jaxq has made.
      restart: forget what an unfinished run to `out` has done. Without it, finished blocks of an
        equal run are taken over, and any other unfinished run is refused.
      unchecked: start even where memory or disk seem too small (see `jq.requirements`).
      mesh, axis: devices that share the work, see `quantize_blocks` and `jq.data_mesh.data_mesh`;
        None is JAX's default device, or the devices of all processes where there are several. An
        unfinished run goes on with as many devices as it began with.
      progress: called after each group of linears.
      meta: further facts for the manifest, beside "model", "recipe" and "calibration".
      target: "orbax" makes a jaxq checkpoint; "gptq", "awq" and "compressed-tensors" make folders
        that other tools read as well.
      options, shard_bytes: of those folders, see `jq.formats.plan` and `jq.formats.shards`.
      target_gpu: the GPU that will run the model ("a100"); what it lacks is refused. None: this
        process's GPU for jaxq checkpoints, if it has one.
      allow_reference: refuse nothing on its account: what it has no kernels for, XLA multiplies.
    Returns: a report, which also stands in the checkpoint.
    Raises: before anything is computed, what `check_run` raises, and CalibrationError for missing
      or unfit calibration data, ResourceError where memory is too small, and OutputError where
      the disk is, or another run is unfinished; later NonFiniteError, and OutputError when the
      disk refuses.
    """
    local = target == "orbax"
    check_gpu(recipe, target_gpu, local=local, allow_reference=allow_reference)
    with Team() as team:
        start = time.perf_counter()
        source = check_run(
            model_path, out, recipe, overwrite=overwrite, target=target, options=options
        )
        if mesh is None and team.count > 1:
            mesh = all_devices(axis)
        if mesh is not None:  # nobody puts whole weights on a device
            source = HFCheckpoint(source.path, place=place_on_host)
        calibration = _fitting(calibration, recipe, source.config)
        if not unchecked:
            devices = checked_mesh(mesh, axis)
            run = run_of_checkpoint(
                source,
                recipe,
                None if calibration is None else calibration.tokens.shape,
                batch_size=batch_size,
                offload=offload,
                target=target,
                devices=1 if devices is None else devices.size,
            )
            check_resources(run, out)
        facts = {
            "model": Path(model_path).resolve().name,
            "recipe": recipe_json(recipe),
            "calibration": None if calibration is None else _calibration_json(calibration),
            **(meta or {}),
        }
        decisive = {
            "files": _file_facts(source),
            **facts,
            "versions": library_versions(),
            "device": device_facts(),
            "mesh": mesh_fact(mesh, axis),
        }
        folder: dict[str, Any] = {"config_files_from": model_path, "overwrite": overwrite}
        cuts = CutRule(Decoder(source.config))
        journal = Journal(out, decisive, source.block_names, restart=restart, team=team, cuts=cuts)
        with journal:
            resumed = len(journal.done)
            _quantize_blocks(
                source,
                recipe,
                calibration,
                journal,
                batch_size=batch_size,
                offload=offload,
                progress=progress,
                mesh=mesh,
                axis=axis,
            )
            report = RunReport(journal.target, journal.reports, 0.0, resumed)
            if target == "orbax":
                opened = CheckpointWriter(out, team=team, cuts=cuts, **folder)
                _save(opened, source, journal, facts, report)
            else:
                schemes = _schemes(recipe, source.config, target, options)
                opened = ExportWriter(out, target, schemes, shard_bytes=shard_bytes, **folder)
                _export(team, opened, source, journal, facts, report)
        return dataclasses.replace(report, seconds=time.perf_counter() - start)


def _save(
    opened: CheckpointWriter,
    source: HFCheckpoint,
    journal: Journal,
    facts: Mapping[str, Any],
    report: RunReport,
) -> None:
    """A jaxq checkpoint, of the journal's blocks."""
    with opened as writer:
        for name, subtree in source.outer().items():
            writer.write_part(name, subtree)
        for name in journal.done:
            writer.link_part(name, *journal.part(name))
        with held_back():
            writer.finish(facts, report.to_dict())
            journal.remove()


def _export(
    team: Team,
    opened: ExportWriter,
    source: HFCheckpoint,
    journal: Journal,
    facts: Mapping[str, Any],
    report: RunReport,
) -> None:
    """A folder for other tools, written by the first process from the blocks of all."""
    with contextlib.ExitStack() as scope:
        team.lead("the export is begun", lambda: scope.enter_context(opened) and None)

        def write_outer() -> None:
            for name, subtree in source.outer().items():
                opened.write_part(name, subtree)

        def write_block(name: str) -> None:
            opened.write_part(name, journal.load(name))

        team.lead("what is outside the blocks is exported", write_outer)
        for name in journal.done:
            team.lead(f"{name} is exported", functools.partial(write_block, name))
        with held_back():
            team.lead("the export is finished", lambda: opened.finish(facts, report.to_dict()))
            journal.remove()


def check_run(
    model_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    overwrite: bool = False,
    target: Literal["orbax"] | ExportFormat = "orbax",
    options: FormatOptions | None = None,
) -> HFCheckpoint:
    """Refuse what cannot end well, before the long run; reads headers only.

    Returns: the opened model.
    Raises:
      ModelError: no model in the folder, or one that is unknown.
      CheckpointError: the folder is a jaxq checkpoint, or a weight file is damaged.
      SpecError: group sizes that do not divide (all of them at once), rules that match nothing,
        linears that the target format cannot express.
      OutputError: the output folder is not empty or not writable.
    """
    if is_checkpoint(model_path):
        raise CheckpointError(
            f"{model_path} is a jaxq checkpoint, quantized already; give the original model"
        )
    source = HFCheckpoint(Path(model_path))
    check_recipe(recipe, *_tensors(source.config))
    if target != "orbax":
        _schemes(recipe, source.config, target, options)
    check_output(out, overwrite=overwrite)
    return source


def check_output(out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise OutputError unless a checkpoint can be made at `out`."""
    path = Path(os.path.realpath(out))
    files.check_target(path, overwrite=overwrite)
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {parent} is not a folder that can be written to; choose another")


def recipe_json(recipe: Recipe) -> list[dict[str, Any]]:
    """A recipe as JSON values; methods carry their class's name."""
    return [
        {
            "pattern": rule.pattern,
            "spec": None if rule.spec is None else dataclasses.asdict(rule.spec),
            "method": None if rule.method is None else _method_json(rule.method),
        }
        for rule in recipe
    ]


def _tensors(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of the blocks' linears, by path without "/kernel"; paths of everything else."""
    linears, others = {}, []
    for entry in weight_table(config):
        if entry.path.startswith("layers_") and entry.path.endswith("/kernel"):
            linears[entry.path.removesuffix("/kernel")] = entry.shape
        else:
            others.append(entry.path)
    return linears, others


def _schemes(
    recipe: Recipe, config: ModelConfig, target: ExportFormat, options: FormatOptions | None
) -> dict[str, Scheme]:
    return schemes_for(plan_of_recipe(recipe, _tensors(config)[0]), target, options)


def _quantize_blocks(
    source: HFCheckpoint,
    recipe: Recipe,
    calibration: CalibrationData | None,
    journal: Journal,
    *,
    mesh: Mesh | None,
    axis: str,
    offload: bool,
    **knobs: Any,
) -> None:
    """Quantize the blocks that the journal does not have yet."""
    outer = source.outer()
    for path, leaf in tree.leaves(outer):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise NonFiniteError(f"{path}: the weight has NaN or infinite entries")
    dtype = compute_dtype(outer["embed"]["embedding"].dtype)
    del outer
    devices = checked_mesh(mesh, axis)
    cut = None if devices is None or offload else devices.sharding(axis)
    blocks = quantize_blocks(
        Decoder(source.config, dtype=dtype),
        source,
        recipe,
        None if calibration is None else calibration.tokens,
        mask=None if calibration is None else calibration.mask,
        done=len(journal.done),
        hidden=journal.hidden(cut),
        mesh=mesh,
        axis=axis,
        offload=offload,
        **knobs,
    )
    for block in blocks:
        journal.commit(block)
        del block  # not to be held while the next one is made


def _file_facts(source: HFCheckpoint) -> dict[str, Any]:
    """By which a run knows that the model is still the one it began with.

    Weights are told by their file's header, size and time: reading all of a large model again
    would take as long as many a run.
    """
    config = (source.path / "config.json").read_bytes()
    facts: dict[str, Any] = {"config.json": hashlib.sha256(config).hexdigest()}
    for file in source.files:
        state = file.stat()
        facts[file.name] = {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            facts[file.name]["header"] = hashlib.sha256(stream.read(length)).hexdigest()
    return facts


def _fitting(
    calibration: CalibrationData | None, recipe: Recipe, config: ModelConfig
) -> CalibrationData | None:
    """The calibration data if the recipe learns from it, checked against the model's context."""
    rules = [rule for rule in recipe if rule.spec is not None and needs_calibration(rule)]
    if not rules:
        return None
    if calibration is None:
        raise CalibrationError(
            f"{type(rules[0].method).__name__} learns from calibration data, and none was given; "
            "give some, or use RTN"
        )
    length, context = calibration.tokens.shape[1], config.max_position_embeddings
    if length > context:
        raise CalibrationError(
            f"calibration samples have {length} tokens, the model's context {context}; "
            f"use calib_seqlen {context} or less"
        )
    return calibration


def _calibration_json(calibration: CalibrationData) -> dict[str, Any]:
    return {**calibration.description, "warnings": list(calibration.warnings)}


def _method_json(method: Method) -> dict[str, Any]:
    options = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {
        "name": type(method).__name__,
        **{k: _method_json(v) if isinstance(v, Method) else v for k, v in options.items()},
    }
