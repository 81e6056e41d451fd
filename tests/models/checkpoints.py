"""Small random checkpoints of every family, in Hugging Face layout."""

import json

import numpy as np
from safetensors.numpy import save_file

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def _config(model_type, architecture, **changes):
    return _SIZES | {"model_type": model_type, "architectures": [architecture]} | changes


def _llama(**changes):
    return _config("llama", "LlamaForCausalLM", **changes)


def _qwen2(**changes):
    return _config(
        "qwen2", "Qwen2ForCausalLM", **({"num_key_value_heads": 2, "rope_theta": 1e6} | changes)
    )


def _qwen3(**changes):
    return _config(
        "qwen3", "Qwen3ForCausalLM", **({"num_key_value_heads": 2, "head_dim": 12} | changes)
    )


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# name -> config.json.  Together they use every key that the reader knows.
CONFIGS = {
    "llama1": _llama(),
    "llama2-linear": _llama(
        num_key_value_heads=4, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=10000.0
    ),
    "llama3": _llama(num_key_value_heads=2, rope_theta=5e5, rope_scaling=_LLAMA3_ROPE),
    "llama3-tied-v5": _llama(
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters=_LLAMA3_ROPE | {"rope_theta": 5e5},
    ),
    "llama-bias-gelu": _llama(attention_bias=True, mlp_bias=True, hidden_act="gelu", head_dim=6),
    "llama-dynamic": _llama(
        max_position_embeddings=10, rope_scaling={"type": "dynamic", "factor": 2.0}
    ),
    "mistral-window": _config(
        "mistral", "MistralForCausalLM", num_key_value_heads=2, sliding_window=5
    ),
    "mistral-full": _config(
        "mistral",
        "MistralForCausalLM",
        num_key_value_heads=2,
        sliding_window=None,
        hidden_act="gelu_pytorch_tanh",
    ),
    "qwen2": _qwen2(tie_word_embeddings=True),
    "qwen2-window": _qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen2-yarn": _qwen2(rope_scaling=_YARN, rope_theta=1e4),
    "qwen3": _qwen3(),
    "qwen3-yarn-v5": _qwen3(
        attention_bias=True,
        rope_parameters=_YARN
        | {"rope_theta": 1e4, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False},
    ),
    "qwen3-layers": _qwen3(
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def shapes(raw):
    """Tensor name -> shape of a checkpoint with this config.json, linears [out, in]."""
    d, f, heads = raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"]
    hd = raw.get("head_dim") or d // heads
    kv = (raw.get("num_key_value_heads") or heads) * hd
    attention_bias = raw.get("attention_bias", False)
    qkv_bias = attention_bias or raw["model_type"] == "qwen2"
    out = {"model.embed_tokens.weight": (raw["vocab_size"], d), "model.norm.weight": (d,)}
    if not raw["tie_word_embeddings"]:
        out["lm_head.weight"] = (raw["vocab_size"], d)
    for i in range(raw["num_hidden_layers"]):
        linears = {
            "self_attn.q_proj": (heads * hd, d, qkv_bias),
            "self_attn.k_proj": (kv, d, qkv_bias),
            "self_attn.v_proj": (kv, d, qkv_bias),
            "self_attn.o_proj": (d, heads * hd, attention_bias),
            "mlp.gate_proj": (f, d, raw.get("mlp_bias", False)),
            "mlp.up_proj": (f, d, raw.get("mlp_bias", False)),
            "mlp.down_proj": (d, f, raw.get("mlp_bias", False)),
        }
        for name, (rows, columns, bias) in linears.items():
            out[f"model.layers.{i}.{name}.weight"] = (rows, columns)
            if bias:
                out[f"model.layers.{i}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"model.layers.{i}.{name}.weight"] = (d,)
        if raw["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                out[f"model.layers.{i}.self_attn.{name}.weight"] = (hd,)
    return out


def random_weights(raw, seed=0):
    """float32 arrays large enough that attention is peaked and every term matters."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(raw).items():
        values = rng.standard_normal(shape)
        if "norm" in name:
            values = 1 + 0.3 * values
        elif len(shape) == 2:
            values *= 1.0 if "embed" in name else 1.5 / np.sqrt(shape[1])
        weights[name] = values.astype(np.float32)
    return weights


def write(folder, raw, weights=None):
    """Write config.json and model.safetensors; returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(raw) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(weights, folder / "model.safetensors")
    return weights


def write_sharded(folder, raw, weights, count=3):
    """Write config.json, `count` shards and their index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {k: v for j, (k, v) in enumerate(weights.items()) if j % count == i}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index
