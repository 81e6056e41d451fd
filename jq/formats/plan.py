"""What will be written in another tool's format, known before the first tensor is: which linear is
stored how, or why it cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from jq.errors import SpecError
from jq.formats import awq, compressed_tensors, gptq
from jq.formats.awq import AWQScheme
from jq.formats.compressed_tensors import CompressedTensorsScheme
from jq.formats.gptq import CheckpointFormat, GPTQScheme
from jq.formats.quant_config import Scheme
from jq.methods.gptq import GPTQ
from jq.preflight import listed
from jq.qtensor import QTensor
from jq.recipe import Recipe, resolve, rounding_of
from jq.spec import QuantSpec, ScaleDtype

ExportFormat = Literal["gptq", "awq", "compressed-tensors"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

# Stands for the paths in a refusal that concerns many linears.
_NAMES = "<linears>"


@dataclasses.dataclass(frozen=True)
class PlannedLinear:
    """A linear `[k, n]` (inputs x outputs) that is, or will be, a QTensor.

    ordered: its stored rows are permuted (act order).
    """

    spec: QuantSpec
    k: int
    n: int
    ordered: bool = False

    @property
    def needs_order(self) -> bool:
        """Whether the order says which inputs share a scale; else rows can be put back."""
        return self.ordered and self.spec.granularity not in ("channel", "tensor")


Plan = Mapping[str, PlannedLinear]


@dataclasses.dataclass(frozen=True)
class FormatOptions:
    """What can be chosen about a format.

    checkpoint_format: of GPTQ files. "gptq" (v1) stores zero points less one, and tools disagree
      about a zero point of 0; "gptq_v2" stores them as they are. None is "gptq" where every linear
      is symmetric, which all tools read, and otherwise "gptq_v2".
    scale_dtype: of the scales in GPTQ and AWQ files; scales that it does not hold exactly are
      refused. compressed-tensors keeps the dtype that scales have.
    legacy_act_order: write compressed-tensors files with an act order across groups
      (`weight_g_idx`), which its releases before 0.19 read.
    """

    checkpoint_format: CheckpointFormat | None = None
    scale_dtype: ScaleDtype = "float16"
    legacy_act_order: bool = False


def plan_of(leaves: Iterable[tuple[str, Any]]) -> dict[str, PlannedLinear]:
    """The plan that QTensors `(path, leaf)` are; other leaves are left out."""
    return {
        path: PlannedLinear(leaf.spec, leaf.k, leaf.n, leaf.order is not None)
        for path, leaf in leaves
        if isinstance(leaf, QTensor)
    }


def plan_of_recipe(
    recipe: Recipe, linears: Mapping[str, tuple[int, ...]]
) -> dict[str, PlannedLinear]:
    """What a recipe will make of the linears: path ("layers_0/mlp/up_proj") -> shape (K, N).

    Returns: the plan by the paths of the kernels ("layers_0/mlp/up_proj/kernel").
    """
    plan = {}
    for path, (k, n) in linears.items():
        rule = resolve(recipe, path)
        if rule is None or rule.spec is None:
            continue
        rounding = rounding_of(rule.method)
        ordered = isinstance(rounding, GPTQ) and rounding.desc_act and not rounding.static_groups
        plan[f"{path}/kernel"] = PlannedLinear(rule.spec, k, n, ordered)
    return plan


def schemes_for(
    plan: Plan, target: ExportFormat, options: FormatOptions | None = None
) -> dict[str, Scheme]:
    """How each linear of a plan is stored, by path.

    Raises: SpecError, listing every tensor with the reason, unless the format can express all.
    """
    if not plan:
        raise SpecError(f"nothing is quantized, so that there is nothing to write as {target}")
    options = options or FormatOptions()
    choose = _chooser(plan, target, options)
    schemes: dict[str, Scheme] = {}
    failures: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, linear in plan.items():
        try:
            schemes[path] = choose(linear, _NAMES)
        except SpecError as error:
            failures.setdefault(str(error), {})[path] = (linear.k, linear.n)
    if failures:
        problems = [
            text.replace(_NAMES, ", ".join(listed(paths))) for text, paths in failures.items()
        ]
        raise SpecError(f"{target} cannot express this model: {'; '.join(problems)}")
    if target == "awq":
        _check_same_group_size(plan)
    return schemes


def _chooser(
    plan: Plan, target: ExportFormat, options: FormatOptions
) -> Callable[[PlannedLinear, str], Scheme]:
    match target:
        case "gptq":
            v2 = options.checkpoint_format == "gptq_v2"
            if options.checkpoint_format is None:
                v2 = not all(linear.spec.symmetric for linear in plan.values())
            return lambda linear, path: _gptq(linear, path, v2, options)
        case "awq":
            return lambda linear, path: _awq(linear, path, options)
        case "compressed-tensors":
            return lambda linear, path: _compressed_tensors(linear, path, options)


def _gptq(linear: PlannedLinear, path: str, v2: bool, options: FormatOptions) -> GPTQScheme:
    spec = linear.spec
    scheme = gptq.scheme_for(spec, path, desc_act=linear.needs_order, v2=v2)
    lanes = 32 if spec.bits == 3 else 32 // spec.bits
    for size, axis in ((linear.k, "inputs"), (linear.n, "outputs")):
        if size % lanes:
            raise SpecError(f"{path}: GPTQ packs {lanes} {axis} in words, but there are {size}")
    return dataclasses.replace(scheme, scale_dtype=options.scale_dtype)


def _awq(linear: PlannedLinear, path: str, options: FormatOptions) -> AWQScheme:
    scheme = awq.scheme_for(linear.spec, path)
    if linear.needs_order:
        raise SpecError(
            f"{path}: AWQ files have no act order; use gptq or compressed-tensors, or quantize "
            "with act_group_aware or static_groups"
        )
    if linear.n % 8:
        raise SpecError(f"{path}: AWQ packs eight outputs in a word, but there are {linear.n}")
    return dataclasses.replace(scheme, scale_dtype=options.scale_dtype)


def _compressed_tensors(
    linear: PlannedLinear, path: str, options: FormatOptions
) -> CompressedTensorsScheme:
    if linear.needs_order and linear.spec.is_float:
        raise SpecError(
            f"{path}: {linear.spec.dtype} weights in compressed-tensors have no act order; "
            "quantize without desc_act"
        )
    if linear.needs_order and not options.legacy_act_order:
        raise SpecError(
            f"{path}: compressed-tensors has no act order across groups since its release 0.19; "
            "use gptq, quantize with act_group_aware or static_groups, or ask for "
            "legacy_act_order, which older releases read"
        )
    return compressed_tensors.scheme_for(linear.spec, path, act_order=linear.needs_order)


def _check_same_group_size(plan: Plan) -> None:
    sizes: dict[int, list[str]] = {}
    for path, linear in plan.items():
        sizes.setdefault(linear.spec.group_size, []).append(path)
    if len(sizes) > 1:
        found = ", ".join(f"{size} ({paths[0]}, ...)" for size, paths in sizes.items())
        raise SpecError(
            f"AWQ files have one group size for the whole model, and this one has {found}; use "
            "gptq or compressed-tensors"
        )
