"""What a config.json's `quantization_config` says of each linear.

config = parse(raw["quantization_config"])
config.scheme("model.layers.0.mlp.down_proj")     # a scheme of the format's module, or None

None means full precision.  Names are those of the checkpoint's modules.  Only data is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jq.errors import ModelError
from jq.formats import awq, gptq
from jq.formats.compressed_tensors import CompressedTensorsScheme
from jq.formats.config_values import choice, entry, flag, integer, mapping, names, pattern, scheme
from jq.formats.ct_config import CompressedTensorsConfig, parse_compressed_tensors

Scheme = gptq.GPTQScheme | awq.AWQScheme | CompressedTensorsScheme

METHODS = ("gptq", "awq", "compressed-tensors")

# Every quantization_config of these may stand in a file of its own, with these entries alike.
_SIDE_FILE = "quantize_config.json"
_COMPARED = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")


@dataclasses.dataclass(frozen=True)
class GPTQConfig:
    """A config of GPTQ files.

    default: where no override says otherwise.
    dynamic: (pattern, overrides) in order, the first whose pattern matches the beginning of a name
      decides; overrides None leave the linear in full precision.
    only: endings of the names in a block that are quantized; None for all.
    lm_head: whether the head is quantized too.
    """

    default: gptq.GPTQScheme
    dynamic: tuple[tuple[re.Pattern[str], Mapping[str, Any] | None], ...] = ()
    only: tuple[str, ...] | None = None
    lm_head: bool = False
    method: Literal["gptq"] = "gptq"

    def scheme(self, name: str) -> gptq.GPTQScheme | None:
        """How the linear of this name is stored; None in full precision."""
        for expression, overrides in self.dynamic:
            if expression.match(name):
                if overrides is None:
                    return None
                # That of the head is for when lm_head says that it is quantized at all.
                return self._default(name) and _overridden(self.default, overrides, name)
        return self._default(name)

    def _default(self, name: str) -> gptq.GPTQScheme | None:
        if not _in_block(name):
            return self.default if self.lm_head and name == "lm_head" else None
        wanted = self.only is None or any(name.endswith(f".{end}") for end in self.only)
        return self.default if wanted else None


@dataclasses.dataclass(frozen=True)
class AWQConfig:
    """A config of AWQ files; `skipped` are parts of the names of linears in full precision."""

    default: awq.AWQScheme
    skipped: tuple[str, ...] = ()
    method: Literal["awq"] = "awq"

    def scheme(self, name: str) -> awq.AWQScheme | None:
        """How the linear of this name is stored; None in full precision."""
        if not _in_block(name) or any(part in name for part in self.skipped):
            return None
        return self.default


QuantConfig = GPTQConfig | AWQConfig | CompressedTensorsConfig


def quantization_of(folder: Path, raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization config of a model folder; None where the model is not quantized.

    Args:
      folder: AutoGPTQ's older folders have it in quantize_config.json only.
      raw: the parsed config.json.
    Raises: ModelError where both say different things.
    """
    from jq.models.hf_values import read_json

    told = raw.get("quantization_config", raw.get("compression_config"))
    file = folder / _SIDE_FILE
    if not file.is_file():
        return None if told is None else mapping(told, "quantization_config")
    aside = read_json(file)
    if told is None:
        return {"quant_method": "gptq", **aside}
    told = mapping(told, "quantization_config")
    for key in _COMPARED:
        if key in told and key in aside and told[key] != aside[key]:
            raise ModelError(
                f"{folder}: {key} is {told[key]!r} in config.json, but {aside[key]!r} in "
                f"{_SIDE_FILE}; one of them is of another model"
            )
    return told


def parse(raw: Mapping[str, Any]) -> QuantConfig:
    """Read a `quantization_config`.

    Raises: ModelError naming the entry that is unknown, malformed or cannot be read.
    """
    method = raw.get("quant_method")
    match method:
        case "gptq":
            return _parse_gptq(raw)
        case "awq":
            return _parse_awq(raw)
        case "compressed-tensors":
            return parse_compressed_tensors(raw)
    raise ModelError(
        f"quantization_config: quant_method {method!r} cannot be read; known: {', '.join(METHODS)}"
    )


def _in_block(name: str) -> bool:
    return name.startswith("model.layers.")


def _parse_gptq(raw: Mapping[str, Any]) -> GPTQConfig:
    where = "quantization_config"
    written = entry(raw, ("checkpoint_format", "format"), "gptq")
    choice(written, ("gptq", "gptq_v2"), f"{where}.checkpoint_format")
    choice(raw.get("pack_dtype", "int32"), ("int32",), f"{where}.pack_dtype")
    if raw.get("is_marlin_format"):
        raise ModelError(f"{where}: is_marlin_format files cannot be read; give the GPTQ files")
    default = scheme(
        gptq.GPTQScheme,
        where,
        bits=integer(raw.get("bits"), f"{where}.bits"),
        group_size=integer(raw.get("group_size", -1), f"{where}.group_size"),
        sym=flag(raw.get("sym", True), f"{where}.sym"),
        desc_act=flag(raw.get("desc_act", False), f"{where}.desc_act"),
        checkpoint_format=written,
        borrow=_by_gptqmodel(raw),
    )
    only = raw.get("modules_in_block_to_quantize")
    return GPTQConfig(
        default,
        _dynamic(raw.get("dynamic")),
        None if only is None else names(only, f"{where}.modules_in_block_to_quantize"),
        flag(raw.get("lm_head", False), f"{where}.lm_head"),
    )


def _by_gptqmodel(raw: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote the files, which decrements zeros in whole words."""
    meta = raw.get("meta")
    told = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return any(str(tool).startswith("gptqmodel") for tool in told or ()) or (
        isinstance(told, str) and told.startswith("gptqmodel")
    )


def _dynamic(raw: Any) -> tuple[tuple[re.Pattern[str], Mapping[str, Any] | None], ...]:
    rules = []
    for text, overrides in mapping(raw or {}, "quantization_config.dynamic").items():
        expression = pattern(text.removeprefix("-:").removeprefix("+:"), f"dynamic {text!r}")
        dropped = text.startswith("-:")
        rules.append((expression, None if dropped else mapping(overrides, f"dynamic {text!r}")))
    return tuple(rules)


def _overridden(
    default: gptq.GPTQScheme, overrides: Mapping[str, Any], name: str
) -> gptq.GPTQScheme:
    where = f"dynamic for {name}"
    changes: dict[str, Any] = {}
    for key in ("bits", "group_size"):
        if key in overrides:
            changes[key] = integer(overrides[key], f"{where}: {key}")
    for key in ("sym", "desc_act"):
        if key in overrides:
            changes[key] = flag(overrides[key], f"{where}: {key}")
    return scheme(gptq.GPTQScheme, where, **{**dataclasses.asdict(default), **changes})


def _parse_awq(raw: Mapping[str, Any]) -> AWQConfig:
    where = "quantization_config"
    version = str(entry(raw, ("version", "checkpoint_format", "format"), "gemm")).lower()
    choice(version, ("gemm",), f"{where}.version")
    bits = integer(entry(raw, ("bits", "w_bit"), None), f"{where}.bits")
    choice(bits, (awq.BITS,), f"{where}.bits")
    size = integer(entry(raw, ("group_size", "q_group_size"), -1), f"{where}.group_size")
    zero_point = flag(raw.get("zero_point", True), f"{where}.zero_point")
    default = scheme(awq.AWQScheme, where, group_size=size, zero_point=zero_point)
    skipped = names(raw.get("modules_to_not_convert") or [], f"{where}.modules_to_not_convert")
    return AWQConfig(default, skipped)
