"""What can be known before the first weight is read: does a recipe fit the linears of a model?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from jq.errors import SpecError
from jq.kernels.choice import capability_of
from jq.recipe import Recipe, resolve
from jq.support import check_target, find_capability

Shapes = Mapping[str, tuple[int, ...]]

_USUAL_SIZES = (16, 32, 64, 128, 256, 512, 1024)


def check_recipe(recipe: Recipe, linears: Shapes, others: Iterable[str] = ()) -> None:
    """Raise SpecError unless every rule decides about something and all group sizes divide.

    Args:
      recipe: see `jq.recipe`.
      linears: path ("layers_0/attention/q_proj") -> shape (K, N) of what can be quantized.
      others: paths of the other tensors, which a rule may leave in full precision by name.
    """
    check_rules(recipe, linears, others)
    check_group_sizes(recipe, linears)


def check_gpu(
    recipe: Recipe, gpu: str | None, *, local: bool = True, allow_reference: bool = False
) -> None:
    """Refuse formats that the GPU which will run them lacks (see `jq.support`).

    Args:
      recipe: see `jq.recipe`.
      gpu: "a100" or "sm_80"; None: the one of this process, where there is one.
      local: whether that one counts; it does not for folders that other tools read.
      allow_reference: refuse nothing.
    Raises: SpecError naming the alternatives, and for a GPU that is unknown.
    """
    if gpu is None:
        capability, name = capability_of(None) if local else (None, "")
    else:
        capability, name = find_capability(gpu)
    if capability is not None:
        specs = [rule.spec for rule in recipe if rule.spec is not None]
        check_target(specs, capability, name, allow_reference=allow_reference)


def check_rules(
    recipe: Recipe, linears: Iterable[str], others: Iterable[str] | None = None
) -> None:
    """Raise SpecError unless something is quantized and every rule decides about something.

    Args:
      recipe: see `jq.recipe`.
      linears: paths of what can be quantized.
      others: paths of the other tensors; None where they are not known, and rules that leave
        tensors in full precision cannot be judged.
    """
    deciding = {path: resolve(recipe, path) for path in linears}
    if not any(deciding.values()) and not _misses_every_linear(recipe, deciding):
        raise SpecError("the recipe quantizes nothing: no rule with a spec comes first anywhere")
    for rule in recipe:
        if rule.spec is not None:
            used = any(rule is chosen for chosen in deciding.values())
        else:
            paths = None if others is None else (*deciding, *others)
            used = paths is None or any(re.search(rule.pattern, path) for path in paths)
        if not used:
            raise SpecError(
                f"rule {rule.pattern!r} decides about nothing: linears are named like "
                "'layers_0/attention/q_proj', and earlier rules come first"
            )


def _misses_every_linear(recipe: Recipe, linears: Iterable[str]) -> bool:
    """Whether there are rules with a spec, and none would match even if it came first."""
    patterns = [rule.pattern for rule in recipe if rule.spec is not None]
    return bool(patterns) and not any(re.search(p, path) for p in patterns for path in linears)


def check_group_sizes(recipe: Recipe, linears: Shapes) -> None:
    """Raise SpecError, listing every tensor and the sizes that would do, unless all group sizes
    divide; arguments as `check_recipe`."""
    grouped: dict[tuple[int, bool], dict[str, tuple[int, ...]]] = {}
    for path, shape in linears.items():
        rule = resolve(recipe, path)
        if rule is None or rule.spec is None or rule.spec.granularity not in ("group", "block"):
            continue
        block = rule.spec.granularity == "block"  # which divides the outputs as well
        sizes = shape if block else shape[:1]
        grouped.setdefault((rule.spec.group_size, block), {})[path] = sizes
    problems = [_problem(size, block, found) for (size, block), found in grouped.items()]
    if any(problems):
        raise SpecError("; ".join(problem for problem in problems if problem))


def _problem(group_size: int, block: bool, sizes: Shapes) -> str | None:
    wrong = {path: size for path, size in sizes.items() if any(n % group_size for n in size)}
    if not wrong:
        return None
    every = {n for size in sizes.values() for n in size}
    valid = [str(g) for g in _USUAL_SIZES if not any(n % g for n in every)]
    if not block:
        valid.append("-1 (per channel)")
    what = "inputs and outputs" if block else "inputs"
    return (
        f"group_size {group_size} does not divide the {what} of {', '.join(listed(wrong))}; "
        f"valid for all of the linears: {', '.join(valid) or 'none of the usual'}"
    )


def listed(sizes: Shapes) -> list[str]:
    """Tensors with their sizes, equal layers together: "layers_0..31/mlp/down_proj (688)"."""
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for path, size in sizes.items():
        match = re.fullmatch(r"layers_(\d+)/(.*)", path)
        name, number = (match.group(2), int(match.group(1))) if match else (path, -1)
        layers.setdefault((name, size), []).append(number)
    lines = []
    for (name, size), numbers in layers.items():
        shown = f"({', '.join(map(str, size))})"
        lines += [f"{prefix}{name} {shown}" for prefix in _ranges(numbers)]
    return lines


def _ranges(numbers: list[int]) -> list[str]:
    """[0, 1, 2, 5] -> ["layers_0..2/", "layers_5/"]; [-1], for a path without a layer -> [""]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1 and number > 0:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [
        "" if first < 0 else f"layers_{first}/" if first == last else f"layers_{first}..{last}/"
        for first, last in runs
    ]
