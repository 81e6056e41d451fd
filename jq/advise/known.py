"""Models that are known by name: their configs' sizes, from which everything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq.errors import ModelError
from jq.models import ModelConfig


def _raw(kind: str, v: int, d: int, f: int, layers: int, heads: int, kv: int, **more: Any) -> dict:
    return {
        "model_type": kind,
        "vocab_size": v,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": False,
        **more,
    }


def _llama(*sizes: int, context: int, **more: Any) -> dict[str, Any]:
    return _raw("llama", *sizes, max_position_embeddings=context, **more)


def _qwen2(*sizes: int, **more: Any) -> dict[str, Any]:
    return _raw("qwen2", *sizes, max_position_embeddings=32768, **more)


def _qwen3(*sizes: int, **more: Any) -> dict[str, Any]:
    return _raw("qwen3", *sizes, max_position_embeddings=40960, head_dim=128, **more)


_TIED = {"tie_word_embeddings": True}
_MISTRAL = {"max_position_embeddings": 32768, "sliding_window": 4096}

# vocabulary, hidden size, MLP size, layers, heads, key-value heads
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-7b": _llama(32000, 4096, 11008, 32, 32, 32, context=2048),
    "llama-13b": _llama(32000, 5120, 13824, 40, 40, 40, context=2048),
    "llama-30b": _llama(32000, 6656, 17920, 60, 52, 52, context=2048),
    "llama-65b": _llama(32000, 8192, 22016, 80, 64, 64, context=2048),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, context=4096),
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40, 40, context=4096),
    "llama-2-70b": _llama(32000, 8192, 28672, 80, 64, 8, context=4096),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, context=8192),
    "llama-3-70b": _llama(128256, 8192, 28672, 80, 64, 8, context=8192),
    "llama-3.1-8b": _llama(128256, 4096, 14336, 32, 32, 8, context=131072),
    "llama-3.1-70b": _llama(128256, 8192, 28672, 80, 64, 8, context=131072),
    "llama-3.1-405b": _llama(128256, 16384, 53248, 126, 128, 8, context=131072),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, context=131072, **_TIED),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 28, 24, 8, context=131072, **_TIED),
    "llama-3.3-70b": _llama(128256, 8192, 28672, 80, 64, 8, context=131072),
    "mistral-7b": _raw("mistral", 32000, 4096, 14336, 32, 32, 8, **_MISTRAL),
    "qwen2.5-0.5b": _qwen2(151936, 896, 4864, 24, 14, 2, **_TIED),
    "qwen2.5-1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2, **_TIED),
    "qwen2.5-3b": _qwen2(151936, 2048, 11008, 36, 16, 2, **_TIED),
    "qwen2.5-7b": _qwen2(152064, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen2(152064, 5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _qwen2(152064, 5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen2(152064, 8192, 29568, 80, 64, 8),
    "qwen3-0.6b": _qwen3(151936, 1024, 3072, 28, 16, 8, **_TIED),
    "qwen3-1.7b": _qwen3(151936, 2048, 6144, 28, 16, 8, **_TIED),
    "qwen3-4b": _qwen3(151936, 2560, 9728, 36, 32, 8, **_TIED),
    "qwen3-8b": _qwen3(151936, 4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(151936, 5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(151936, 5120, 25600, 64, 64, 8),
}
_ALIASES = {
    "llama-70b": "llama-2-70b",
    "llama-8b": "llama-3-8b",
    "llama-405b": "llama-3.1-405b",
}


def find_model(name: str) -> tuple[str, ModelConfig]:
    """A model by its name ("llama-3-8b"), or the folder that holds its config.json.

    Returns: the name under which it is known, or the folder's, and the config.
    Raises: ModelError for an unknown name, and for a folder that is no model.
    """
    key = name.lower().replace("_", "-").replace(" ", "-").rpartition("/")[2]
    for ending in ("-hf", "-instruct", "-chat", "-base", "-it"):
        key = key.removesuffix(ending)
    key = key.replace("llama2", "llama-2").replace("llama3", "llama-3")
    key = _ALIASES.get(key.replace("meta-", ""), key.replace("meta-", ""))
    if Path(name).is_dir():
        return name, ModelConfig.from_folder(name)
    if key in CONFIGS:
        return key, ModelConfig.from_hf(CONFIGS[key])
    raise ModelError(
        f"model {name!r} is neither a folder with config.json nor a known name; "
        f"known: {', '.join(CONFIGS)}"
    )
