"""The table of Hugging Face tensor names: checkpoint key -> parameter path, shape and transform."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jq.models.config import ModelConfig

# Buffers that older checkpoints carry and that follow from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class WeightEntry:
    """One tensor.

    Attributes:
        key: its name in the checkpoint.
        path: its place in the parameter tree, "layers_0/attention/q_proj/kernel".
        shape: its shape in the parameter tree; the checkpoint's is reversed where `transpose`.
        transpose: linears are stored `[out, in]`, kernels are `[in, out]`.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    transpose: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transpose else self.shape


def weight_table(config: ModelConfig) -> tuple[WeightEntry, ...]:
    """All tensors of a model, in the order of the parameter tree."""
    blocks = (entry for i in range(config.num_hidden_layers) for entry in block_table(config, i))
    first, *rest = outer_table(config)
    return (first, *blocks, *rest)


def outer_table(config: ModelConfig) -> tuple[WeightEntry, ...]:
    """Embedding, final norm and, unless tied, the language model head."""
    v, d = config.vocab_size, config.hidden_size
    entries = (
        WeightEntry("model.embed_tokens.weight", "embed/embedding", (v, d)),
        WeightEntry("model.norm.weight", "final_norm/scale", (d,)),
    )
    if config.tie_word_embeddings:
        return entries
    return (*entries, WeightEntry("lm_head.weight", "lm_head/kernel", (d, v), transpose=True))


def block_table(config: ModelConfig, index: int) -> tuple[WeightEntry, ...]:
    """The tensors of one layer."""
    c = config
    d, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linears = (
        ("self_attn.q_proj", "attention/q_proj", (d, q), c.qkv_bias),
        ("self_attn.k_proj", "attention/k_proj", (d, kv), c.qkv_bias),
        ("self_attn.v_proj", "attention/v_proj", (d, kv), c.qkv_bias),
        ("self_attn.o_proj", "attention/o_proj", (q, d), c.o_bias),
        ("mlp.gate_proj", "mlp/gate_proj", (d, f), c.mlp_bias),
        ("mlp.up_proj", "mlp/up_proj", (d, f), c.mlp_bias),
        ("mlp.down_proj", "mlp/down_proj", (f, d), c.mlp_bias),
    )
    norms = [
        ("input_layernorm", "input_norm", d),
        ("post_attention_layernorm", "post_attention_norm", d),
    ]
    if c.qk_norm:
        norms += [
            ("self_attn.q_norm", "attention/q_norm", c.head_dim),
            ("self_attn.k_norm", "attention/k_norm", c.head_dim),
        ]
    key, path = f"model.layers.{index}", f"layers_{index}"
    entries = [WeightEntry(f"{key}.{k}.weight", f"{path}/{p}/scale", (n,)) for k, p, n in norms]
    for k, p, shape, bias in linears:
        entries.append(WeightEntry(f"{key}.{k}.weight", f"{path}/{p}/kernel", shape, True))
        if bias:
            entries.append(WeightEntry(f"{key}.{k}.bias", f"{path}/{p}/bias", shape[1:]))
    return tuple(entries)


def ignored(key: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no parameter for it."""
    tied_copy = config.tie_word_embeddings and key == "lm_head.weight"
    return tied_copy or _IGNORED.fullmatch(key) is not None


def mapping_failures(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], limit: int = 20
) -> str | None:
    """All disagreements of names and shapes as one text, None where there are none."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key}: expected shape {expected[key]}, found {found[key]}"
        for key in expected
        if key in found and tuple(found[key]) != tuple(expected[key])
    ]
    parts = [
        _listing("missing", missing, limit),
        _listing("unexpected", unexpected, limit),
        _listing("wrong shape", wrong, limit),
    ]
    return "; ".join(part for part in parts if part) or None


def _listing(title: str, items: Iterable[str], limit: int) -> str:
    items = list(items)
    if not items:
        return ""
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return f"{title} ({len(items)}): {', '.join(items[:limit])}{more}"
