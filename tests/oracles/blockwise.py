"""Quantizing a decoder block by block, in float64: a block's inputs, one linear group at a time.

Stands on the decoder's oracle, whose attention, norms and linears it calls with a checkpoint's own
names; linears are [out, in], as checkpoints store them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tests.oracles import decoder

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
PRODUCERS = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}

Layer = Mapping[str, np.ndarray]
Rounding = Callable[[str, np.ndarray], np.ndarray]


def layer_of(weights: Layer, index: int) -> dict[str, np.ndarray]:
    """The tensors of one layer in float64, without their prefix."""
    prefix = f"model.layers.{index}."
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return {k: np.asarray(v, np.float64) for k, v in found.items()}


def embed(weights: Layer, tokens: np.ndarray) -> np.ndarray:
    """[T] -> the first layer's input [T, D]."""
    table = np.asarray(weights["model.embed_tokens.weight"], np.float64)
    return np.stack([table[token] for token in tokens])


def run_block(
    raw: Mapping, layer: Layer, index: int, h: np.ndarray, rounded: Rounding | None = None
) -> dict[str, np.ndarray]:
    """What each group of linears reads for one sample [T, D], and the block's output, "out".

    rounded: (group, its input) -> the input that its linears multiply, for 8-bit activations.
    """
    rounded = rounded or (lambda _, x: x)
    eps = raw.get("rms_norm_eps", 1e-6)
    seen = {"qkv": decoder._rms_norm(h, layer["input_layernorm.weight"], eps)}
    heads = layer["self_attn.o_proj.weight"].shape[1]
    # With an identity behind it, attention returns what its output projection reads.
    open_ended = {k: v for k, v in layer.items() if not k.startswith("self_attn.o_proj")}
    open_ended["self_attn.o_proj.weight"] = np.eye(heads)
    window = decoder._window(raw, index)
    x = rounded("qkv", seen["qkv"])
    seen["o"] = decoder._attention(raw, open_ended, x, window, eps)
    h = h + decoder._linear(layer, "self_attn.o_proj", rounded("o", seen["o"]))
    seen["gate_up"] = decoder._rms_norm(h, layer["post_attention_layernorm.weight"], eps)
    x = rounded("gate_up", seen["gate_up"])
    gate = decoder._activation(raw["hidden_act"], decoder._linear(layer, "mlp.gate_proj", x))
    seen["down"] = gate * decoder._linear(layer, "mlp.up_proj", x)
    seen["out"] = h + decoder._linear(layer, "mlp.down_proj", rounded("down", seen["down"]))
    return seen


def inputs(
    raw: Mapping,
    layer: Layer,
    index: int,
    samples: list[np.ndarray],
    rounded: Rounding | None = None,
) -> dict[str, list[np.ndarray]]:
    """`run_block` for every sample: group (or "out") -> a list of [T, K]."""
    runs = [run_block(raw, layer, index, h, rounded) for h in samples]
    return {name: [run[name] for run in runs] for name in runs[0]}


def shared(values: np.ndarray, group: str, raw: Mapping, reduce: Callable) -> np.ndarray:
    """Values per input channel [K], made equal over the query heads that read one value head."""
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    if group != "o" or kv_heads == heads:
        return values
    out = np.empty_like(values)
    hd = len(values) // heads
    share = heads // kv_heads
    for kv in range(kv_heads):
        for channel in range(hd):
            some = [(kv * share + i) * hd + channel for i in range(share)]
            out[some] = reduce(values[some])
    return out


def fold(layer: Layer, group: str, scale: np.ndarray, raw: Mapping) -> dict[str, np.ndarray]:
    """The layer with `scale` [K] moved out of what makes the group's input, into its weights."""
    out = dict(layer)
    for name in GROUPS[group]:
        out[f"{name}.weight"] = layer[f"{name}.weight"] * scale[None, :]
    if group in NORMS:
        name = f"{NORMS[group]}.weight"
        out[name] = layer[name] / scale
        return out
    producer = PRODUCERS[group]
    if group == "o":
        heads = raw["num_attention_heads"]
        share = heads // (raw.get("num_key_value_heads") or heads)
        hd = len(scale) // heads
        # Head h of the queries reads value head h // share; all of them have the same scale.
        scale = np.concatenate([scale[h * hd : (h + 1) * hd] for h in range(0, heads, share)])
    out[f"{producer}.weight"] = out[f"{producer}.weight"] / scale[:, None]
    if f"{producer}.bias" in out:
        out[f"{producer}.bias"] = out[f"{producer}.bias"] / scale
    return out
