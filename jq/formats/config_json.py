"""`quantization_config` of config.json, as the tools that load a model expect it.

Names are those of modules ("model.layers.0.mlp.down_proj").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from jq.formats.awq import AWQScheme
from jq.formats.compressed_tensors import CompressedTensorsScheme
from jq.formats.gptq import GPTQScheme
from jq.formats.plan import ExportFormat, Scheme

# The release of compressed-tensors whose layout is written (3 bits were packed differently before).
COMPRESSED_TENSORS_VERSION = "0.19.0"
_HEAD = "lm_head"


def quantization_config(
    target: ExportFormat, schemes: Mapping[str, Scheme], unquantized: Sequence[str]
) -> dict[str, Any]:
    """The JSON object that tells how a model's linears are stored.

    Args:
      target: the format.
      schemes: module -> scheme, of that format; at least one.
      unquantized: the modules of the other linears in the blocks.
    """
    match target:
        case "gptq":
            return _gptq(_only(GPTQScheme, schemes), unquantized)
        case "awq":
            return _awq(_only(AWQScheme, schemes), unquantized)
        case "compressed-tensors":
            return _compressed_tensors(_only(CompressedTensorsScheme, schemes), unquantized)


def _gptq(schemes: Mapping[str, GPTQScheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """The most frequent scheme is the model's; `dynamic` has what deviates, the first match wins
    ("+:" changes, "-:" leaves in full precision)."""
    stated = {module: _gptq_fields(scheme) for module, scheme in schemes.items()}
    counts = Counter(tuple(fields.items()) for fields in stated.values())
    base = dict(counts.most_common(1)[0][0])
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(module)}$": fields for module, fields in stated.items() if fields != base
    }
    dynamic |= _left_out(unquantized)
    return {
        "quant_method": "gptq",
        **base,
        "checkpoint_format": next(iter(schemes.values())).checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": False,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"jaxq:{version('jaxq')}"]},
    }


def _left_out(modules: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {f"-:^{re.escape(module)}$": {} for module in modules}


def _gptq_fields(scheme: GPTQScheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": scheme.desc_act,
    }


def _awq(schemes: Mapping[str, AWQScheme], unquantized: Sequence[str]) -> dict[str, Any]:
    scheme = next(iter(schemes.values()))  # there is one for all
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": scheme.zero_point,
        # Tools look for these as parts of a module's name, so they are whole names.
        "modules_to_not_convert": [*unquantized, _HEAD] if unquantized else None,
        # The same for GPTQModel, which loads AWQ files too but does not know the other.
        **({"dynamic": _left_out(unquantized)} if unquantized else {}),
    }


def _compressed_tensors(
    schemes: Mapping[str, CompressedTensorsScheme], unquantized: Sequence[str]
) -> dict[str, Any]:
    """A config group per scheme, the most frequent first; a single one targets every linear."""
    modules: dict[CompressedTensorsScheme, list[str]] = {}
    for module, scheme in schemes.items():
        modules.setdefault(scheme, []).append(module)
    ranked = sorted(modules.items(), key=lambda item: -len(item[1]))
    groups = {
        f"group_{i}": _config_group(scheme, ["Linear"] if len(ranked) == 1 else names)
        for i, (scheme, names) in enumerate(ranked)
    }
    formats = {scheme.format for scheme in modules}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*unquantized, _HEAD],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": COMPRESSED_TENSORS_VERSION,
    }


def _config_group(scheme: CompressedTensorsScheme, targets: list[str]) -> dict[str, Any]:
    grouped = scheme.strategy == "group"
    block = [scheme.group_size] * 2 if scheme.strategy == "block" else None
    return {
        "targets": targets,
        "format": scheme.format,
        "weights": {
            "num_bits": scheme.num_bits,
            "type": scheme.type,
            "strategy": scheme.strategy,
            "group_size": scheme.group_size if grouped else None,
            "block_structure": block,
            "symmetric": scheme.symmetric,
            "dynamic": False,
            "actorder": "group" if scheme.act_order else None,
        },
        "input_activations": _input_activations(scheme),
        "output_activations": None,
    }


def _input_activations(scheme: CompressedTensorsScheme) -> dict[str, Any] | None:
    activation = scheme.activation
    if activation is None:
        return None
    return {
        "num_bits": 8,
        "type": scheme.type,
        "strategy": activation.granularity,
        "group_size": scheme.group_size if activation.granularity == "group" else None,
        "block_structure": None,
        "symmetric": True,
        "dynamic": not activation.static,
        "actorder": None,
    }


def _only(kind: type, schemes: Mapping[str, Any]) -> Mapping[str, Any]:
    wrong = [module for module, scheme in schemes.items() if not isinstance(scheme, kind)]
    if wrong or not schemes:
        raise TypeError(f"schemes of {wrong or 'no module'} are not of {kind.__name__}")
    return schemes
