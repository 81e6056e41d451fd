"""Tile sizes of every kernel as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from jq.pallas_kernels.ampere.config import W4Config, W8Config
from jq.pallas_kernels.config import Config, DecodeConfig, PrefillConfig
from jq.pallas_kernels.config8 import Config8, Decode8Config, Prefill8Config

KINDS = {
    "decode": DecodeConfig,
    "prefill": PrefillConfig,
    "ampere": W4Config,
    "decode8": Decode8Config,
    "prefill8": Prefill8Config,
    "ampere8": W8Config,
}


def config_json(config: Config | Config8 | W4Config | W8Config) -> dict[str, Any]:
    """A config as JSON, and back with `config_of`."""
    kind = next(name for name, kind in KINDS.items() if isinstance(config, kind))
    return {"kind": kind, **dataclasses.asdict(config)}


def config_of(value: dict[str, Any] | None) -> Any:
    """The config that `config_json` wrote down; None stays None."""
    if value is None:
        return None
    fields = {name: field for name, field in value.items() if name != "kind"}
    return KINDS[value["kind"]](**fields)
