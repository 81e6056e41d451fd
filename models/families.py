"""The table of known model families, and what each one assumes where its config.json is silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jq.errors import ModelError


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the common decoder.

    Attributes:
        architecture: class name that Hugging Face checkpoints carry in `architectures`.
        defaults: values of config keys that the family's checkpoints may leave out.
        qkv_bias, o_bias, mlp_bias: True, False, or the config key that says so.
        qk_norm: RMSNorm over each head's query and key channels.
        sliding: which layers see a sliding window: none, all (where `sliding_window` is set), or
            by layer (`use_sliding_window` with `layer_types`, or with `max_window_layers`).
    """

    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    sliding: Literal["none", "all", "by_layer"] = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        sliding="all",
        defaults={
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, sliding="by_layer", defaults=_QWEN_DEFAULTS),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        sliding="by_layer",
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    ),
}


def family(model_type: str) -> Family:
    """The family of a `model_type`; ModelError listing the known ones otherwise."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is unknown; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
