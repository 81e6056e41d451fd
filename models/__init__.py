"""Language models: one functional Flax decoder, Hugging Face weights, tokenizers and generation.

Import it as `jq.models`.  The submodules are imported where they are used, so that a program that
only reads a config pays for nothing else:

    jq.models.config       ModelConfig, read from a Hugging Face config.json
    jq.models.families     the table of known model families
    jq.models.decoder      Decoder, the Linen model, which also speaks the blockwise protocol
    jq.models.hf_weights   HFCheckpoint (reads safetensors block by block), save_hf
    jq.models.tokenizer    Tokenizer
    jq.models.generation   generate, stream, stream_text
"""

from __future__ import annotations

if __name__ != "jq.models":
    raise ImportError(f"import this package as jq.models, not as {__name__}")

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Decoder": "decoder",
    "HFCheckpoint": "hf_weights",
    "KVCache": "cache",
    "ModelConfig": "config",
    "RopeConfig": "rope",
    "Sampling": "sampling",
    "Tokenizer": "tokenizer",
    "generate": "generation",
    "save_hf": "hf_weights",
    "stream": "generation",
    "stream_text": "generation",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
