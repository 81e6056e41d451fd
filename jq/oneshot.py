"""Quantizing any Flax parameters at once: no block-by-block model, no calibration loop.

For models of one's own.  Every 2-D leaf ".../kernel" [K, N] is a linear and goes by its path; a
recipe decides about it as it does in `jq.calib`'s driver, and the same programs round it.  3-D
leaves [E, K, N] that are said to be experts are as many linears (see `jq.experts`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jq import tree
from jq.blockwise import LinearGroup
from jq.errors import CalibrationError, NonFiniteError, SpecError
from jq.experts import Experts, ExpertsReport, round_experts
from jq.folding import fold, restore_dtypes
from jq.group import GroupReport, round_group
from jq.methods import awq, smoothquant
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.smoothquant import SmoothQuant
from jq.preflight import check_recipe
from jq.qtensor import QTensor
from jq.recipe import Recipe, Rule, needs_calibration, resolve, rounding_of
from jq.scaling import awq_terms, scaling_method, smooth_terms, total_loss
from jq.spec import QuantSpec
from jq.statistics import InputStats, rescale

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

ReportCallback = Callable[[tuple[str, ...], GroupReport | ExpertsReport], None]


def quantize(
    params: Mapping[str, Any],
    recipe: Recipe,
    stats: Mapping[str, InputStats] | None = None,
    *,
    groups: Sequence[LinearGroup] = (),
    experts: Mapping[str, Experts] | None = None,
    on_group: ReportCallback | None = None,
) -> dict[str, Any]:
    """Replace kernels by QTensors.

    Every linear is quantized on statistics of the full-precision model: the errors of linears
    before it are not seen. `jq.quantize_model` sees them, and is the better choice for a model that
    speaks the blockwise protocol.

    Args:
      params: nested dicts; linears are the 2-D leaves ".../kernel" [K, N], of any float dtype.
      recipe: rules matched against the paths of linears, without "/kernel"; see `jq.recipe`.
      stats: path of a linear -> statistics of its input, as `jq.collect` gives them; round to
        nearest needs none.
      groups: which linears read the same input, with whole paths, and the op before it, where AWQ
        and SmoothQuant can put a scale.  A group must list everything that reads its producer.
      experts: regular expression -> `Experts`: a 3-D leaf ".../kernel" [E, K, N] whose path one
        matches (the first counts) holds the linears of E experts, with statistics that have a
        leading axis E too.  Other 3-D kernels are left alone.
      on_group: called with the paths of linears that were rounded side by side and their report, an
        `ExpertsReport` for experts, which tells who saw too few tokens.
    Returns: the same tree with QTensor leaves; everything else keeps its dtype.  Kernels and norms
      that a scale was folded into have changed.
    Raises:
      SpecError: the recipe does not fit, a linear is already quantized, or a method that scales has
        no group to do it in.
      CalibrationError: statistics are missing or of another size, or a Hessian that no damping
        makes positive definite.
      NonFiniteError: NaN or infinity in a weight or a statistic.

    May be traced (`jax.jit` with output shardings, `jax.eval_shape`); values are then not checked.
    """
    work: Any = dict(params)
    linears = _linears(params, experts or {})
    others = [path for path, _ in tree.leaves(params)]
    check_recipe(recipe, {path: leaf.shape[-2:] for path, leaf in linears.items()}, others)
    units = _units(linears, recipe, groups, experts or {})
    stats = {} if stats is None else stats
    used = {unit: _statistics(unit, stats, linears) for unit in units}
    _check_weights(linears, units)
    dtypes = {path: leaf.dtype for path, leaf in tree.leaves(params) if hasattr(leaf, "dtype")}
    scales = {}
    for unit in units:
        if unit.scaling is not None:
            scales[unit] = _choose(unit, linears, used[unit])
    for unit, scale in scales.items():
        assert unit.group is not None
        work = _wide(work, unit.group)
        work, scales[unit] = fold(work, unit.group, scale)
    for unit in units:
        work = _round(work, unit, used[unit], scales.get(unit), on_group)
    return restore_dtypes(work, dtypes)


class _Unit(NamedTuple):
    """Linears that read one input, what decides about each, and what scales their input."""

    linears: tuple[str, ...]
    rules: tuple[Rule | None, ...]
    group: LinearGroup | None
    scaling: AWQ | SmoothQuant | None
    experts: Experts | None = None

    @property
    def quantized(self) -> list[tuple[str, QuantSpec]]:
        """Paths and formats of those that a rule decides about."""
        rules = zip(self.linears, self.rules, strict=True)
        return [(path, r.spec) for path, r in rules if r is not None and r.spec is not None]


def _linears(params: Mapping[str, Any], experts: Mapping[str, Experts]) -> dict[str, Any]:
    """Path of each linear -> its kernel, quantized ones and stacks of experts' included."""
    kernels = {
        path.removesuffix("/kernel"): leaf
        for path, leaf in tree.leaves(params)
        if path.endswith("/kernel")
    }
    stacks = {path: leaf for path, leaf in kernels.items() if _experts_of(path, experts)}
    for pattern in experts:
        if not any(re.search(pattern, path) for path in stacks):
            raise SpecError(f"experts {pattern!r} match no kernel; there are {', '.join(kernels)}")
    for path, leaf in stacks.items():
        if getattr(leaf, "ndim", 0) != 3:
            raise SpecError(f"{path}/kernel: experts' kernels are [E, K, N], not {leaf.shape}")
    return {path: leaf for path, leaf in kernels.items() if path in stacks or _is_matrix(leaf)}


def _is_matrix(leaf: Any) -> bool:
    return getattr(leaf, "ndim", 0) == 2


def _experts_of(path: str, experts: Mapping[str, Experts]) -> Experts | None:
    return next((known for pattern, known in experts.items() if re.search(pattern, path)), None)


def _units(
    linears: Mapping[str, Any],
    recipe: Recipe,
    groups: Sequence[LinearGroup],
    experts: Mapping[str, Experts],
) -> list[_Unit]:
    units, seen = [], set()
    for group in groups:
        for path in group.linears:
            if path not in linears:
                raise SpecError(
                    f"group {group.name!r}: there is no linear {path!r}; there are "
                    f"{', '.join(linears)}"
                )
            if path in seen:
                raise SpecError(f"{path} stands in two groups; a linear reads one input")
            seen.add(path)
        rules = tuple(resolve(recipe, path) for path in group.linears)
        scaling = scaling_method(f"group {group.name!r}", group, rules)
        treated = {_experts_of(path, experts) for path in group.linears}
        if len(treated) > 1:
            raise SpecError(
                f"group {group.name!r}: {', '.join(group.linears)} read the same input, and "
                "`experts` says different things of them"
            )
        units.append(_Unit(group.linears, rules, group, scaling, treated.pop()))
    for path in linears:
        if path not in seen:
            rules, known = (resolve(recipe, path),), _experts_of(path, experts)
            units.append(_Unit((path,), rules, None, None, known))
    for unit in units:
        _check_unit(unit, linears)
    return [unit for unit in units if unit.quantized]


def _check_unit(unit: _Unit, linears: Mapping[str, Any]) -> None:
    for path, rule in zip(unit.linears, unit.rules, strict=True):
        if rule is None:
            continue
        if isinstance(linears[path], QTensor):
            raise SpecError(
                f"{path}/kernel: already quantized ({linears[path].spec.dtype}); start from the "
                "full-precision parameters, or leave it alone with a rule that has no spec"
            )
        if unit.group is None and isinstance(rule.method, AWQ | SmoothQuant):
            raise SpecError(
                f"{path}: {type(rule.method).__name__} moves a scale into the op before a linear: "
                "say which one with groups=(LinearGroup(name, linears, producer),), or round with "
                f"{rounding_of(rule.method)}"
            )
    if unit.experts is not None:
        for path, rule in zip(unit.linears, unit.rules, strict=True):
            if rule is not None and isinstance(rule.method, AWQ | SmoothQuant):
                raise SpecError(
                    f"{path}: {type(rule.method).__name__} scales an input that all experts "
                    f"share, and each of them wants its own: round with {rounding_of(rule.method)}"
                )
        return
    if isinstance(unit.scaling, SmoothQuant) and unit.scaling.alpha == "auto":
        raise SpecError(
            f"{', '.join(unit.linears)}: alpha='auto' compares outputs on the inputs themselves, "
            "and statistics are not enough: give a number, or use jq.quantize_model"
        )


def _statistics(
    unit: _Unit, stats: Mapping[str, InputStats], linears: Mapping[str, Any]
) -> InputStats | None:
    """The statistics of a unit's input, or None where there are none and none are needed."""
    needing = [
        path
        for path, rule in zip(unit.linears, unit.rules, strict=True)
        if rule is not None and needs_calibration(rule)
    ]
    given = next((path for path in unit.linears if path in stats), None)
    if given is None:
        if needing:
            raise CalibrationError(
                f"{needing[0]}: its method learns from calibration inputs, and stats has none of "
                "this linear; collect them with jq.collect, or use RTN"
            )
        return None
    found, (*lead, k, _) = stats[given], linears[given].shape
    if found.gram.shape != (*lead, k, k):
        inputs = found.gram.shape[-1] if found.gram.ndim == len(lead) + 2 else found.gram.shape
        wanted = (*lead, k) if lead else k
        raise CalibrationError(
            f"{given}: statistics of {inputs} inputs, but the kernel has {wanted}; were they "
            "collected from this model?"
        )
    if not _traced(found):
        if not all(bool(jnp.all(jnp.isfinite(field))) for field in found):
            raise NonFiniteError(f"{given}: the statistics have NaN or infinite entries")
        if not float(jnp.sum(jnp.trace(found.gram, axis1=-2, axis2=-1))) > 0:
            raise CalibrationError(
                f"{given}: every calibration input is zero, or there was none "
                f"({int(jnp.sum(found.count))} tokens)"
            )
    return found


def _traced(value: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def _check_weights(linears: Mapping[str, Any], units: Sequence[_Unit]) -> None:
    for unit in units:
        for path, _ in unit.quantized:
            if not _traced(linears[path]) and not _finite(linears[path]):
                raise NonFiniteError(f"{path}/kernel: the weight has NaN or infinite entries")


@jax.jit
def _finite(w: Float[Array, "*E K N"]) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(w))


def _choose(unit: _Unit, linears: Mapping[str, Any], stats: InputStats | None) -> jax.Array:
    assert unit.group is not None
    assert unit.scaling is not None
    assert stats is not None
    # Only what the scale depends on: groups that differ in names alone share a program.
    group = dataclasses.replace(unit.group, name="", linears=(), producer=None)
    specs = tuple(spec for _, spec in unit.quantized)
    weights = tuple(linears[path] for path, _ in unit.quantized)
    return _group_scale(weights, stats, group=group, specs=specs, method=unit.scaling)


@functools.partial(jax.jit, static_argnames=("group", "specs", "method"))
def _group_scale(
    weights: tuple[jax.Array, ...],
    stats: InputStats,
    *,
    group: LinearGroup,
    specs: tuple[QuantSpec, ...],
    method: AWQ | SmoothQuant,
) -> Float[Array, "K"]:
    """The scale of a group; AWQ's search compares the linears' own outputs, over all tokens."""
    weights = tuple(w.astype(jnp.float32) for w in weights)
    if isinstance(method, SmoothQuant):
        assert method.alpha != "auto"
        return smoothquant.smoothing_scale(method.alpha, *smooth_terms(group, weights, stats))
    pairs = list(zip(weights, specs, strict=True))
    abs_mean, magnitude = awq_terms(group, pairs, stats, method)
    if not method.search_scale:
        return awq.scale_of(method.exponent, abs_mean, magnitude)
    loss = total_loss([awq.gram_loss([w], stats.gram, spec) for w, spec in pairs])
    return awq.search_scale(abs_mean, magnitude, loss, method.n_grid)[0]


def _wide(params: Any, group: LinearGroup) -> Any:
    """The kernels that a scale is about to be folded into, in float32."""
    paths = [f"{path}/kernel" for path in group.linears]
    if group.producer_kind == "linear":
        paths.append(f"{group.producer}/kernel")
    for path in paths:
        if not tree.has(params, path):
            raise SpecError(f"group {group.name!r}: its producer has no parameter {path!r}")
        leaf = tree.get(params, path)
        if not isinstance(leaf, QTensor):
            params = tree.replace(params, path, jnp.asarray(leaf, jnp.float32))
    return params


def _round(
    params: Any,
    unit: _Unit,
    stats: InputStats | None,
    scale: jax.Array | None,
    on_group: ReportCallback | None,
) -> Any:
    """Quantize the linears of a unit, those with equal rules side by side."""
    if scale is not None and stats is not None:
        stats = rescale(stats, scale)
    for rule in dict.fromkeys(rule for rule in unit.rules if rule is not None):
        assert rule.spec is not None
        paths = tuple(p for p, r in zip(unit.linears, unit.rules, strict=True) if r == rule)
        weights = [jnp.asarray(tree.get(params, f"{path}/kernel")) for path in paths]
        rounding = rounding_of(rule.method)
        if unit.experts is None:
            tensors, _, report = round_group(weights, stats, rule.spec, rounding, scale=scale)
            solve = report
        else:
            tensors, report = round_experts(weights, stats, rule.spec, rounding, unit.experts)
            solve = report.group
        if isinstance(rounding, GPTQ) and not _traced(report):
            _check_solve(paths, solve)
        for path, tensor in zip(paths, tensors, strict=True):
            params = tree.replace(params, f"{path}/kernel", tensor)
        if on_group is not None:
            on_group(paths, report)
    return params


def _check_solve(paths: tuple[str, ...], report: GroupReport) -> None:
    if bool(jnp.any(report.failed)):
        raise CalibrationError(
            f"{', '.join(paths)}: no damping up to {float(jnp.max(report.damp)):g} makes the "
            "Hessian positive definite: collect from more tokens, raise damp_percent, or use RTN"
        )
