"""The `quantization_config` of compressed-tensors: config groups, targets and `ignore`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from jq.errors import ModelError
from jq.formats.compressed_tensors import CompressedTensorsScheme
from jq.formats.config_values import choice, flag, integer, mapping, names, pattern, scheme
from jq.spec import FP8, ActivationSpec

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
# What modules are: every one that this library quantizes is a Linear of torch.
_CLASS = "Linear"

Matcher = str | re.Pattern[str]


@dataclasses.dataclass(frozen=True)
class CompressedTensorsConfig:
    """A config of compressed-tensors files.

    groups: (targets, scheme) in order. The group that names a linear decides, else the first with a
      regular expression that matches the beginning of its name, else the one of all Linears.
    ignore: names, expressions or classes that stay in full precision.
    """

    groups: tuple[tuple[tuple[Matcher, ...], CompressedTensorsScheme], ...]
    ignore: tuple[Matcher, ...] = ()
    method: Literal["compressed-tensors"] = "compressed-tensors"

    def scheme(self, name: str) -> CompressedTensorsScheme | None:
        """How the linear of this name is stored; None in full precision."""
        if any(_matches(one, name) for one in self.ignore):
            return None
        ranked = [
            (rank, found)
            for targets, found in self.groups
            for one in targets
            if (rank := _matches(one, name))
        ]
        return max(ranked, key=lambda item: item[0])[1] if ranked else None


def parse_compressed_tensors(raw: Mapping[str, Any]) -> CompressedTensorsConfig:
    """Read a `quantization_config` with quant_method "compressed-tensors".

    Raises: ModelError naming the entry that is unknown, malformed or cannot be read.
    """
    where = "quantization_config"
    choice(raw.get("quantization_status", "compressed"), ("compressed",), f"{where}.status")
    for key in ("kv_cache_scheme", "transform_config"):
        if raw.get(key):
            raise ModelError(f"{where}.{key} cannot be read: {raw[key]!r}")
    sparsity = mapping(raw.get("sparsity_config") or {}, f"{where}.sparsity_config")
    choice(sparsity.get("format", "dense"), ("dense",), f"{where}.sparsity_config.format")
    groups = mapping(raw.get("config_groups") or {}, f"{where}.config_groups")
    found = []
    for name, group in groups.items():
        place = f"{where}.config_groups.{name}"
        targets = names(mapping(group, place).get("targets"), f"{place}.targets")
        found.append((tuple(map(_matcher, targets)), _scheme(group, raw.get("format"), place)))
    if not found:
        raise ModelError(f"{where}.config_groups is empty: it says nothing of how to read weights")
    ignore = tuple(map(_matcher, names(raw.get("ignore") or [], f"{where}.ignore")))
    return CompressedTensorsConfig(tuple(found), ignore)


def _matcher(text: str) -> Matcher:
    if text.startswith("re:"):
        return pattern(text.removeprefix("re:"), f"target {text!r}")
    return text


def _matches(one: Matcher, name: str) -> int:
    """0 for no match; the more narrowly, the higher."""
    if isinstance(one, str):
        return 3 if one == name else int(one == _CLASS)
    return 2 if one.match(name) else 0


def _scheme(group: Mapping[str, Any], default: Any, where: str) -> CompressedTensorsScheme:
    form = group.get("format") or default
    choice(form, FORMATS, f"{where}.format")
    if group.get("output_activations"):
        raise ModelError(f"{where}.output_activations cannot be read")
    weights = mapping(group.get("weights"), f"{where}.weights")
    place = f"{where}.weights"
    kind = weights.get("type", "int")
    choice(kind, ("int", "float"), f"{place}.type")
    strategy = weights.get("strategy") or ("channel" if not weights.get("group_size") else "group")
    choice(strategy, ("group", "channel", "tensor", "block"), f"{place}.strategy")
    if weights.get("dynamic"):
        raise ModelError(f"{place}.dynamic must be false, got {weights['dynamic']!r}")
    symmetric = flag(weights.get("symmetric", True), f"{place}.symmetric")
    size = _group_size(weights, strategy, place)
    activation = _activation(group.get("input_activations"), size, f"{where}.input_activations")
    order = weights.get("actorder")
    choice(order, (None, False, True, "weight", "static", "group", "dynamic"), f"{place}.actorder")
    return scheme(
        CompressedTensorsScheme,
        where,
        format=form,
        num_bits=integer(weights.get("num_bits"), f"{place}.num_bits"),
        type=kind,
        strategy=strategy,
        group_size=size,
        symmetric=symmetric,
        act_order=order in (True, "group", "dynamic"),
        activation=activation,
    )


def _group_size(weights: Mapping[str, Any], strategy: str, where: str) -> int:
    if strategy == "group":
        return integer(weights.get("group_size"), f"{where}.group_size")
    if strategy != "block":
        return -1
    sides = weights.get("block_structure")
    if not isinstance(sides, list) or len(sides) != 2 or sides[0] != sides[1]:
        raise ModelError(f"{where}.block_structure {sides!r} cannot be read; known: [128, 128]")
    return integer(sides[0], f"{where}.block_structure")


def _activation(raw: Any, block: int, where: str) -> ActivationSpec | None:
    if raw is None:
        return None
    raw = mapping(raw, where)
    choice(raw.get("num_bits"), (8,), f"{where}.num_bits")
    kind = raw.get("type", "int")
    choice(kind, ("int", "float"), f"{where}.type")
    if not flag(raw.get("symmetric", True), f"{where}.symmetric"):
        raise ModelError(
            f"{where}.symmetric is false: asymmetric activations cannot be read; quantize the "
            "original model with symmetric ones"
        )
    dynamic = flag(raw.get("dynamic", False), f"{where}.dynamic")
    strategy = raw.get("strategy") or ("token" if dynamic else "tensor")
    choice(strategy, ("token", "tensor", "group"), f"{where}.strategy")
    if strategy == "group" and raw.get("group_size") != block:
        raise ModelError(
            f"{where}.group_size is {raw.get('group_size')!r}, but the weights' blocks are {block}"
        )
    return scheme(
        ActivationSpec,
        where,
        dtype="int8" if kind == "int" else FP8,
        granularity=strategy,
        static=not dynamic,
    )
