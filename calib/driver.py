"""The block-by-block driver: calibrate and quantize a model of any depth, one block at a time.

The hidden states of the calibration set stay; one block's weights come in, its linears are
quantized group by group on inputs that the already quantized ones make, and the block is handed out
before the next comes in.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jq import tree
from jq.blockwise import BlockwiseModel, LinearGroup
from jq.calib.many_devices import ManyDevices
from jq.calib.one_device import OneDevice
from jq.calib.report import BlockReport, LinearReport, Progress, ProgressCallback
from jq.calib.scaling import Scaling
from jq.calib.stages import Stream
from jq.data_mesh import checked_mesh
from jq.errors import CalibrationError, NonFiniteError, SpecError
from jq.evaluate.forward import vocabulary_size
from jq.folding import fold, restore_dtypes
from jq.group import GroupReport
from jq.methods.gptq import GPTQ
from jq.preflight import check_rules
from jq.qtensor import QTensor
from jq.recipe import Recipe, Rule, needs_calibration, resolve, rounding_of
from jq.scaling import scaling_method
from jq.spec import check_group_size
from jq.statistics import InputStats, rescale


@runtime_checkable
class BlockSource(Protocol):
    """Where weights come from, a block at a time (`jq.models.HFCheckpoint`, or `TreeSource`)."""

    def block(self, name: str) -> Mapping[str, Any]:
        """Parameters of one block."""
        ...

    def outer(self) -> Mapping[str, Any]:
        """Parameters outside the blocks: embeddings, final norm, output head."""
        ...


@dataclasses.dataclass(frozen=True)
class TreeSource:
    """Parameters that are already in memory."""

    params: Mapping[str, Any]
    block_names: tuple[str, ...]

    def block(self, name: str) -> Mapping[str, Any]:
        """Parameters of one block."""
        return self.params[name]

    def outer(self) -> Mapping[str, Any]:
        """Everything that is no block."""
        return {k: v for k, v in self.params.items() if k not in self.block_names}


@dataclasses.dataclass(frozen=True)
class QuantizedBlock:
    """A finished block.

    name: its name.
    params: its parameters, with QTensor leaves.
    report: what happened.
    hidden: [samples, T, D], the calibration set's hidden states as the next block reads them; None
      after the last block, and where nothing is calibrated.  On a mesh, in its order and with its
      empty rows (see `jq.data_mesh`); a NumPy array has the rows of this process's devices.
    """

    name: str
    params: dict[str, Any]
    report: BlockReport
    hidden: jax.Array | np.ndarray | None = None


def quantize_model(
    model: BlockwiseModel,
    params: Mapping[str, Any],
    recipe: Recipe,
    tokens: np.ndarray | jax.Array | None = None,
    *,
    mask: np.ndarray | jax.Array | None = None,
    batch_size: int = 1,
    offload: bool = False,
    mesh: Mesh | None = None,
    axis: str = "data",
    progress: ProgressCallback | None = None,
) -> tuple[dict[str, Any], tuple[BlockReport, ...]]:
    """Quantize parameters that fit in memory: (params with QTensor leaves, a report per block).

    Arguments and errors are those of `quantize_blocks`.
    """
    source = TreeSource(params, model.block_names)
    out, reports = dict(params), []
    for block in quantize_blocks(
        model,
        source,
        recipe,
        tokens,
        mask=mask,
        batch_size=batch_size,
        offload=offload,
        mesh=mesh,
        axis=axis,
        progress=progress,
    ):
        out[block.name] = block.params
        reports.append(block.report)
        del block  # nor the hidden states it left
    return out, tuple(reports)


def quantize_blocks(
    model: BlockwiseModel,
    source: BlockSource,
    recipe: Recipe,
    tokens: np.ndarray | jax.Array | None = None,
    *,
    mask: np.ndarray | jax.Array | None = None,
    batch_size: int = 1,
    offload: bool = False,
    done: int = 0,
    hidden: jax.Array | np.ndarray | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
    progress: ProgressCallback | None = None,
) -> Iterator[QuantizedBlock]:
    """Quantize a model block by block.

    Args:
      model: see `jq.blockwise`.
      source: gives each block's parameters when its turn comes.
      recipe: rules matched against "layers_0/attention/q_proj"; see `jq.recipe`.
      tokens: int32 [samples, T], the calibration set; None where no method needs one.
      mask: bool [samples, T], True for real tokens.
      batch_size: samples that are on a device at a time where hidden states are offloaded; it
        never changes the result.
      offload: keep the hidden states of the calibration set in host memory.  Device memory then
        holds a block, its statistics and `batch_size` samples.
      done: blocks that an earlier run has finished; those are left out.
      hidden: what the last of them left, see `QuantizedBlock`.
      mesh: devices that share the work (see `jq.data_mesh`); None, and a mesh of one, is JAX's
        default device.  Samples, the block's weights and the outputs of each solve are cut over
        them.  Sums are then added in another order, so that weights near the middle between two
        codes may come out as the other one; for a given mesh the result is always the same.
      axis: of the mesh, the one that cuts.
      progress: called after each group of linears.
    Yields: the blocks in order, each as soon as it is finished.
    Raises: SpecError when the recipe does not fit the model, CalibrationError when statistics are
      needed and there are no usable tokens, NonFiniteError for NaN or infinite weights and
      activations.
    """
    if batch_size < 1:
        raise CalibrationError(f"batch_size is {batch_size}; it must be 1 or more")
    plan = {name: _rules(model.linear_groups, recipe, name) for name in model.block_names}
    check_rules(
        recipe, [f"{b}/{x}" for b in plan for group in model.linear_groups for x in group.linears]
    )
    for name, rules in plan.items():
        for group, some in zip(model.linear_groups, rules, strict=True):
            scaling_method(name, group, some)
    calibrating = any(needs_calibration(r) for rules in plan.values() for r in _flat(rules))
    groups = len(model.linear_groups)
    clock = _Clock(progress, len(model.block_names) * groups, done * groups)
    devices = checked_mesh(mesh, axis)
    workers: Workers = OneDevice(model, batch_size, offload)
    if devices is not None:
        workers = ManyDevices(model, batch_size, offload, devices, _samples(tokens))
    stream, fed = None, 0
    if calibrating and done < len(model.block_names):
        ids, mask = _checked_tokens(tokens, mask)
        fed = ids.size if mask is None else int(mask.sum())
        stream = _first_stream(model, source, workers, ids, mask, hidden)
    for name in model.block_names[done:]:
        work = _BlockWork(model, name, plan[name], workers, fed, clock)
        block, stream = work.run(source.block(name), stream)
        yield block
        del block  # not to be held while the next one is made


Workers = OneDevice | ManyDevices
Rules = tuple[tuple[Rule | None, ...], ...]


def _rules(groups: Sequence[LinearGroup], recipe: Recipe, block: str) -> Rules:
    return tuple(
        tuple(resolve(recipe, f"{block}/{linear}") for linear in group.linears) for group in groups
    )


def _flat(rules: Rules) -> list[Rule]:
    return [rule for group in rules for rule in group if rule is not None]


def _first_stream(
    model: BlockwiseModel,
    source: BlockSource,
    workers: Workers,
    tokens: np.ndarray,
    mask: np.ndarray | None,
    hidden: jax.Array | np.ndarray | None,
) -> Stream:
    """What the first block reads: the embedded calibration set, or what an earlier run left."""
    if hidden is not None:
        return workers.restored(hidden, tokens, mask)
    outer = source.outer()
    vocabulary = vocabulary_size(model, outer)
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise CalibrationError(
            f"calibration token ids {tokens.min()}..{tokens.max()} are not all in the model's "
            f"vocabulary 0..{vocabulary - 1}: were they made by this model's tokenizer?"
        )
    return workers.first(outer, tokens.astype(np.int32), mask)


def _samples(tokens: Any) -> int:
    return 0 if tokens is None else len(tokens)


def _checked_tokens(tokens: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None]:
    if tokens is None:
        raise CalibrationError(
            "this recipe learns from calibration tokens and none were given; pass tokens, "
            "or use RTN"
        )
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise CalibrationError(
            f"calibration tokens must be integers [samples, T], not {tokens.dtype} {tokens.shape}"
        )
    if mask is not None and np.shape(mask) != tokens.shape:
        raise CalibrationError(f"mask {np.shape(mask)} does not fit tokens {tokens.shape}")
    return tokens, None if mask is None else np.asarray(mask, bool)


class _Clock:
    """Counts finished groups and reports them."""

    def __init__(self, progress: ProgressCallback | None, total: int, before: int) -> None:
        self.progress, self.total, self.before, self.done = progress, total, before, before
        self.start = time.perf_counter()

    def tick(self, block: str, group: str, error: float | None) -> None:
        self.done += 1
        if self.progress is not None:
            seconds = time.perf_counter() - self.start
            self.progress(
                Progress(self.done, self.total, block, group, error, seconds, self.before)
            )


class _BlockWork:
    """One block on its way from full precision to quantized."""

    def __init__(
        self,
        model: BlockwiseModel,
        name: str,
        rules: Rules,
        workers: Workers,
        fed: int,
        clock: _Clock,
    ) -> None:
        self.model, self.name, self.rules = model, name, rules
        self.groups = model.linear_groups
        self.kind = model.block_kind(name)
        self.workers, self.fed, self.clock = workers, fed, clock
        self.dtype: Any = None
        self.reports: list[LinearReport] = []
        self.quantized: dict[str, QTensor] = {}

    def run(
        self, params: Mapping[str, Any], stream: Stream | None
    ) -> tuple[QuantizedBlock, Stream | None]:
        """Quantize the block; the returned stream is the next block's input."""
        start = time.perf_counter()
        self._check_shapes(params)
        dtypes = {path: leaf.dtype for path, leaf in tree.leaves(params)}
        self.dtype = self._work_dtype(params, stream)
        work, finite = self.workers.prepare(params, self.dtype)
        self._check_finite(finite)
        if stream is None:
            for index in range(len(self.groups)):
                work = self._round(index, work, None, None)
        else:
            work, stream = self._calibrate(work, stream)
        for path, qtensor in self.quantized.items():
            work = tree.replace(work, path, qtensor)
        work = restore_dtypes(work, dtypes)
        jax.block_until_ready(work)
        seconds = time.perf_counter() - start
        report = BlockReport(self.name, tuple(self.reports), seconds)
        last = self.name == self.model.block_names[-1]
        hidden = None if stream is None or last else stream.x
        return QuantizedBlock(self.name, work, report, hidden), stream

    def _calibrate(self, params: Any, stream: Stream) -> tuple[Any, Stream]:
        scales: dict[int, Scaling] = {}
        early: dict[int, InputStats] = {}
        if self._scales_anything() or not self._sequential():
            params, early, scales = self._full_precision_pass(params, stream)
        last = len(self.groups)
        for index in range(last):
            collect = self._sequential() and self._calibrates(index)
            stream, stats = self._stage(index, params, stream, collect)
            if not self._sequential():
                stats = early.get(index)
            params = self._round(index, params, stats, scales.get(index))
        if self.name != self.model.block_names[-1]:
            stream, _ = self._stage(last, params, stream, False)
        return params, stream

    def _full_precision_pass(
        self, params: Any, stream: Stream
    ) -> tuple[Any, dict[int, InputStats], dict[int, Scaling]]:
        """Statistics of every group on this block's own weights; scales chosen and folded."""
        stats_of, scales = {}, {}
        for index in range(len(self.groups)):
            stream, stats = self._stage(index, params, stream, True)
            assert stats is not None
            stats_of[index] = stats
            method = self._scaling_method(index)
            if method is None:
                continue
            scaling = self.workers.choose(
                self.kind,
                index,
                params,
                stream,
                stats,
                specs=tuple(None if r is None else r.spec for r in self.rules[index]),
                method=method,
            )
            scales[index] = scaling
        chosen = {}
        for index, scaling in scales.items():
            params, exact = fold(params, self.groups[index], scaling.scale)
            stats_of[index] = rescale(stats_of[index], exact)
            chosen[index] = scaling._replace(scale=exact)
        return self.workers.settle(params), stats_of, chosen

    def _scales_anything(self) -> bool:
        return any(self._scaling_method(i) is not None for i in range(len(self.groups)))

    def _scaling_method(self, index: int) -> Any:
        return scaling_method(self.name, self.groups[index], self.rules[index])

    def _sequential(self) -> bool:
        roundings = [rounding_of(rule.method) for rule in _flat(self.rules)]
        return all(r.true_sequential for r in roundings if isinstance(r, GPTQ))

    def _calibrates(self, index: int) -> bool:
        return any(needs_calibration(rule) for rule in self.rules[index] if rule is not None)

    def _stage(
        self, index: int, params: Any, stream: Stream, collect: bool
    ) -> tuple[Stream, InputStats | None]:
        result = self.workers.stage(self.kind, index, params, stream, collect=collect)
        finite = np.asarray(result.finite)
        if not finite.all():
            where = self.groups[index].name + "'s input" if index < len(self.groups) else "output"
            raise NonFiniteError(
                f"{self.name}: {where} is NaN or infinite for calibration sample "
                f"{int(np.argmin(finite))} ({int((~finite).sum())} of {finite.size} samples); "
                "nothing was quantized from it"
            )
        if collect:
            self._check_statistics(index, result.stats)
        return result.stream, result.stats

    def _check_statistics(self, index: int, stats: InputStats | None) -> None:
        assert stats is not None
        seen, trace = int(stats.count), float(jnp.trace(stats.gram))
        path = f"{self.name}/{self.groups[index].linears[0]}"
        if seen != self.fed or seen == 0:
            raise CalibrationError(f"{path}: statistics saw {seen} tokens, but {self.fed} were fed")
        if not trace > 0:
            raise CalibrationError(
                f"{path}: every calibration input is zero (trace of the Hessian {trace}); "
                "is the model loaded, and the calibration text sensible?"
            )

    def _check_finite(self, finite: Any) -> None:
        for path, ok in tree.leaves(jax.device_get(finite)):
            if not ok:
                raise NonFiniteError(f"{self.name}/{path}: the weight has NaN or infinite entries")

    def _work_dtype(self, params: Mapping[str, Any], stream: Stream | None) -> Any:
        """Of the kernels while the block is worked on; None leaves them as they are.

        Where weights and hidden states are of the same 16 bits, so are they: the stages multiply
        in these anyway.  But a scale that is folded into weights must not round them.
        """
        if stream is None:
            return None
        stored = {leaf.dtype for path, leaf in tree.leaves(params) if path.endswith("kernel")}
        narrow = stored == {stream.x.dtype} and not self._scales_anything()
        return stream.x.dtype if narrow else jnp.float32

    def _check_shapes(self, params: Mapping[str, Any]) -> None:
        for path, leaf in tree.leaves(params):
            if isinstance(leaf, QTensor):
                raise SpecError(f"{self.name}/{path}: already quantized ({leaf.spec.dtype})")
        for group, rules in zip(self.groups, self.rules, strict=True):
            for linear, rule in zip(group.linears, rules, strict=True):
                spec = None if rule is None else rule.spec
                if spec is not None and spec.granularity in ("group", "block"):
                    k = tree.get(params, f"{linear}/kernel").shape[0]
                    check_group_size(k, spec.group_size, f"{self.name}/{linear}")

    def _round(self, index: int, params: Any, stats: InputStats | None, scaling: Any) -> Any:
        """Quantize the linears of a group, those with equal rules side by side.

        The result computes what the quantized block does: where tokens run through it, weights
        without 8-bit activations stand in it dequantized, so that the stages are the same programs
        before and after, whatever the format.
        """
        group, rules = self.groups[index], self.rules[index]
        worst = None
        for rule in dict.fromkeys(r for r in rules if r is not None):
            assert rule.spec is not None  # `resolve` gives rules without one as None
            linears = [n for n, r in zip(group.linears, rules, strict=True) if r == rule]
            qtensors, kernels, report = self.workers.round(
                [tree.get(params, f"{n}/kernel") for n in linears],
                stats,
                rule.spec,
                rounding_of(rule.method),
                None if scaling is None else scaling.scale,
            )
            for linear, qtensor, kernel in zip(linears, qtensors, kernels, strict=True):
                path = f"{linear}/kernel"
                self.quantized[path] = qtensor
                plain = self.dtype is not None and rule.spec.activation is None
                leaf = kernel.astype(self.dtype) if plain else qtensor
                params = tree.replace(params, path, leaf)
            made = self._report(linears, qtensors, rule, report, stats, scaling)
            self.reports += made
            errors = [r.output_error for r in made if r.output_error is not None]
            worst = max([*errors, worst or 0.0]) if errors else worst
        self.clock.tick(self.name, group.name, worst)
        return params

    def _report(
        self,
        linears: Sequence[str],
        qtensors: Sequence[QTensor],
        rule: Rule,
        report: GroupReport,
        stats: InputStats | None,
        scaling: Any,
    ) -> list[LinearReport]:
        report = jax.device_get(report)
        tokens = 0 if stats is None else int(stats.count)
        gptq = isinstance(rounding_of(rule.method), GPTQ)
        choice = None if scaling is None else float(scaling.choice)
        out = []
        for i, (linear, w) in enumerate(zip(linears, qtensors, strict=True)):
            warnings = _warnings(report, rule, tokens, w.k)
            out.append(
                LinearReport(
                    path=f"{self.name}/{linear}",
                    dtype=w.spec.dtype,
                    bits_per_weight=w.nbytes * 8 / (w.k * w.n),
                    method=str(rule.method),
                    weight_error=float(report.weight_error[i]),
                    output_error=_known(report.output_error[i]),
                    rtn_output_error=_known(report.rtn_output_error[i]),
                    damp_percent=float(report.damp) if gptq else None,
                    scale_choice=_known(choice),
                    tokens=tokens,
                    warnings=warnings,
                )
            )
        return out


def _known(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _warnings(report: GroupReport, rule: Rule, tokens: int, k: int) -> tuple[str, ...]:
    rounding = rounding_of(rule.method)
    if not isinstance(rounding, GPTQ):
        return ()
    out = []
    if tokens < k:
        out.append(f"{tokens} calibration tokens cannot fill a Hessian of {k} inputs: use more")
    if report.failed:
        out.append("no damping made the Hessian positive definite: rounded to nearest")
    elif float(report.damp) > rounding.damp_percent * 1.5:
        out.append(f"damping raised from {rounding.damp_percent} to {float(report.damp):g}")
    return tuple(out)
