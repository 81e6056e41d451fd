"""Rotary embeddings in `config.json`, in the old keys and in those of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.errors import ModelError
from jq.models.hf_values import flag, number, present
from jq.models.rope import ROPE_KINDS, RopeConfig


def rope_from_hf(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """From `rope_theta` + `rope_scaling`, or from `rope_parameters` (transformers 5)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"config.json: rope parameters must be an object, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"config.json: rope type {kind!r} is unknown; known: {', '.join(ROPE_KINDS)}"
        )
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"config.json: partial_rotary_factor {partial!r} is not supported, only 1")
    theta = number(scaling, "rope_theta", number(present(raw), "rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    return RopeConfig(
        theta=theta, kind=kind, **_rope_scaling(kind, present(scaling), max_positions)
    )


def _rope_scaling(kind: str, scaling: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    context = scaling.get("original_max_position_embeddings", max_positions)
    if kind == "yarn" and "factor" not in scaling:
        scaling = {**scaling, "factor": max_positions / context}
    if "factor" not in scaling:
        raise ModelError(f"config.json: rope type {kind!r} needs a factor")
    keys: tuple[str, ...] = ("factor",)
    if kind == "llama3":
        keys += ("low_freq_factor", "high_freq_factor")
    if kind == "yarn":
        keys += ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    fields: dict[str, Any] = {k: number(scaling, k, 0.0) for k in keys if k in scaling}
    if kind == "yarn" and "truncate" in scaling:
        fields["truncate"] = flag(scaling, "truncate")
    if kind == "dynamic":
        # The growth is measured from the config's own length, whatever else it says.
        context = max_positions
    if kind != "linear":
        fields["original_max_position_embeddings"] = context
    return fields


def rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` entry, which `rope_theta` stands beside."""
    if rope.kind == "default":
        return None
    raw: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.original_max_position_embeddings is not None:
        raw["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.kind == "llama3":
        raw |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        raw |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        raw |= {k: getattr(rope, k) for k in optional if getattr(rope, k) is not None}
    return raw
