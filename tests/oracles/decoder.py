"""A decoder in NumPy float64, one sequence at a time, straight from a checkpoint's own names.

Written with loops over heads and tokens and with complex numbers for the rotary embedding, from the
papers and the meaning of the config's keys; it shares no code with `jq.models`.
"""

import math

import numpy as np


def decoder_logits(raw, weights, tokens):
    """Logits float64 [T, V].

    raw: parsed config.json.  weights: checkpoint name -> array, linears [out, in].  tokens: [T].
    """
    w = {name: np.asarray(value).astype(np.float64) for name, value in weights.items()}
    eps = raw.get("rms_norm_eps", 1e-6)
    h = np.stack([w["model.embed_tokens.weight"][token] for token in tokens])
    for i in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
        x = _rms_norm(h, layer["input_layernorm.weight"], eps)
        h = h + _attention(raw, layer, x, _window(raw, i), eps)
        x = _rms_norm(h, layer["post_attention_layernorm.weight"], eps)
        gate = _activation(raw["hidden_act"], _linear(layer, "mlp.gate_proj", x))
        h = h + _linear(layer, "mlp.down_proj", gate * _linear(layer, "mlp.up_proj", x))
    h = _rms_norm(h, w["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if raw.get("tie_word_embeddings") else "lm_head.weight"
    return h @ w[head].T


def _attention(raw, layer, x, window, eps):
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    hd = raw.get("head_dim") or raw["hidden_size"] // heads
    q, k, v = (_linear(layer, f"self_attn.{n}_proj", x) for n in "qkv")
    out = np.zeros((len(x), heads * hd))
    frequencies, scale = rope(raw, hd, len(x))
    for head in range(heads):
        kv = head // (heads // kv_heads)
        qh, kh = q[:, head * hd : (head + 1) * hd], k[:, kv * hd : (kv + 1) * hd]
        vh = v[:, kv * hd : (kv + 1) * hd]
        if "self_attn.q_norm.weight" in layer:
            qh = _rms_norm(qh, layer["self_attn.q_norm.weight"], eps)
            kh = _rms_norm(kh, layer["self_attn.k_norm.weight"], eps)
        qh, kh = _turn(qh, frequencies, scale), _turn(kh, frequencies, scale)
        for t in range(len(x)):
            first = 0 if window is None else max(0, t - window + 1)
            scores = np.array([qh[t] @ kh[s] / math.sqrt(hd) for s in range(first, t + 1)])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            out[t, head * hd : (head + 1) * hd] = sum(
                p[s - first] * vh[s] for s in range(first, t + 1)
            )
    return _linear(layer, "self_attn.o_proj", out)


def _turn(x, frequencies, scale):
    half = x.shape[1] // 2
    z = x[:, :half] + 1j * x[:, half:]
    z = z * np.exp(1j * np.outer(np.arange(len(x)), frequencies)) * scale
    return np.concatenate([z.real, z.imag], axis=1)


def rope(raw, hd, length):
    """(radians per position [hd/2], factor on the rotated vectors)."""
    s = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = s.get("rope_theta") or raw.get("rope_theta") or 10000.0
    kind = s.get("rope_type") or s.get("type") or "default"
    longest = raw["max_position_embeddings"]
    if kind == "dynamic" and length > longest:
        theta *= (s["factor"] * length / longest - (s["factor"] - 1)) ** (hd / (hd - 2))
    f = [theta ** (-2 * i / hd) for i in range(hd // 2)]
    scale = 1.0
    if kind == "linear":
        f = [x / s["factor"] for x in f]
    if kind == "llama3":
        f = [_llama3(x, s) for x in f]
    if kind == "yarn":
        f = [_yarn(i, x, s, hd, theta, longest) for i, x in enumerate(f)]
        scale = s.get("attention_factor") or _yarn_scale(s)
    return np.array(f), scale


def _llama3(frequency, s):
    wavelength = 2 * math.pi / frequency
    context = s["original_max_position_embeddings"]
    if wavelength < context / s["high_freq_factor"]:
        return frequency
    if wavelength > context / s["low_freq_factor"]:
        return frequency / s["factor"]
    smooth = context / wavelength - s["low_freq_factor"]
    smooth /= s["high_freq_factor"] - s["low_freq_factor"]
    return (1 - smooth) * frequency / s["factor"] + smooth * frequency


def _yarn(i, frequency, s, hd, theta, longest):
    context = s.get("original_max_position_embeddings") or longest
    ends = []
    for rotations in (s.get("beta_fast") or 32, s.get("beta_slow") or 1):
        # The (fractional) channel pair whose wavelength fits `rotations` times into the context.
        ends.append(hd / 2 * math.log(context / (2 * math.pi * rotations), theta))
    if s.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], hd - 1)
    ramp = min(max((i - low) / ((high - low) or 0.001), 0), 1)
    return frequency / s["factor"] * ramp + frequency * (1 - ramp)


def _yarn_scale(s):
    def m(k):
        return 0.1 * k * math.log(s["factor"]) + 1 if s["factor"] > 1 else 1.0

    both = s.get("mscale") and s.get("mscale_all_dim")
    return m(s["mscale"]) / m(s["mscale_all_dim"]) if both else m(1)


def _window(raw, layer):
    size = raw.get("sliding_window")
    if raw["model_type"] == "mistral":
        return size
    if raw["model_type"] in ("qwen2", "qwen3") and raw.get("use_sliding_window"):
        types = raw.get("layer_types")
        if types:
            return size if types[layer] == "sliding_attention" else None
        return size if layer >= raw["max_window_layers"] else None
    return None


def _linear(layer, name, x):
    y = x @ layer[f"{name}.weight"].T
    return y + layer[f"{name}.bias"] if f"{name}.bias" in layer else y


def _rms_norm(x, scale, eps):
    return np.stack([row / math.sqrt(np.mean(row**2) + eps) * scale for row in x])


def _activation(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(name)
