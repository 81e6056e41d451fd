"""Model configuration, read from and written to Hugging Face `config.json`.

Only data is read: `auto_map` and other references to code are ignored, and never executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jq.errors import ModelError
from jq.models.families import FAMILIES, Family, family
from jq.models.rope import ROPE_KINDS, RopeConfig

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")

_ACTIVATION_ALIASES = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_HF_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of a decoder; hashable, so that it can be a static argument.

    Attributes:
        model_type: a key of `jq.models.families.FAMILIES`.
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: V, D, F and the layer count.
        num_attention_heads, num_key_value_heads, head_dim: H, KV and hd; H is a multiple of KV, and
            H * hd need not be D.
        hidden_act: one of `ACTIVATIONS`.
        rms_norm_eps: added to the mean square before the root.
        layer_windows: per layer, how many tokens (itself included) a token sees; None = all.
        qkv_bias, o_bias, mlp_bias: which linears have a bias.
        qk_norm: RMSNorm over each head's query and key channels.
        tie_word_embeddings: logits from the transposed embedding, no `lm_head`.
        eos_token_ids, bos_token_id, pad_token_id: as the config says; the tokenizer's files may
            say more (see `jq.models.tokenizer`).
        initializer_range: standard deviation of the initial weights.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    layer_windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        family(self.model_type)
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_hidden_layers)
        _check(self)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from the parsed contents of a `config.json`.

        Raises:
            ModelError: no `model_type` or an unknown one, a class that is not the family's language
                model, a missing or malformed key, an unknown rope type or activation.
        """
        if not isinstance(raw.get("model_type"), str):
            raise ModelError(f"config.json has no model_type; known: {', '.join(sorted(FAMILIES))}")
        kind = family(raw["model_type"])
        _check_architecture(raw, kind)
        values = {**kind.defaults, **{k: v for k, v in raw.items() if v is not None}}
        # `"sliding_window": null` says "no window"; a missing key says "the family's default".
        if "sliding_window" in raw:
            values["sliding_window"] = raw["sliding_window"]
        sizes = {key: _integer(values, key) for key in _REQUIRED}
        heads = sizes["num_attention_heads"]
        if "head_dim" not in values and sizes["hidden_size"] % max(heads, 1):
            raise ModelError(
                f"config.json: hidden_size {sizes['hidden_size']} is not a multiple of "
                f"num_attention_heads {heads}, and there is no head_dim"
            )
        max_positions = _integer(values, "max_position_embeddings")
        return cls(
            model_type=raw["model_type"],
            **sizes,
            num_key_value_heads=_integer(
                {"num_key_value_heads": heads} | values, "num_key_value_heads"
            ),
            head_dim=_integer(
                {"head_dim": sizes["hidden_size"] // max(heads, 1)} | values, "head_dim"
            ),
            hidden_act=_activation(values.get("hidden_act", "silu")),
            max_position_embeddings=max_positions,
            rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
            rope=_rope(raw, max_positions),
            layer_windows=_windows(kind, values, sizes["num_hidden_layers"]),
            qkv_bias=_flag(values, kind.qkv_bias),
            o_bias=_flag(values, kind.o_bias),
            mlp_bias=_flag(values, kind.mlp_bias),
            qk_norm=kind.qk_norm,
            tie_word_embeddings=_flag(values, "tie_word_embeddings"),
            eos_token_ids=token_ids(values.get("eos_token_id")),
            bos_token_id=_first(token_ids(values.get("bos_token_id"))),
            pad_token_id=_first(token_ids(values.get("pad_token_id"))),
            initializer_range=_number(values, "initializer_range", 0.02),
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read `<path>/config.json`; ModelError where it is missing or is not JSON."""
        return cls.from_hf(read_json(Path(path) / "config.json"))

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that `from_hf` reads back to an equal config."""
        kind = family(self.model_type)
        raw: dict[str, Any] = {
            "architectures": [kind.architecture],
            "model_type": self.model_type,
            **{key: getattr(self, key) for key in _REQUIRED},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": _HF_ACTIVATIONS.get(self.hidden_act, self.hidden_act),
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": _rope_to_hf(self.rope),
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": _ids_to_hf(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        for flag, value in (
            (kind.qkv_bias, self.qkv_bias),
            (kind.o_bias, self.o_bias),
            (kind.mlp_bias, self.mlp_bias),
        ):
            if isinstance(flag, str):
                raw[flag] = value
        return raw | _windows_to_hf(kind, self.layer_windows)

    def with_changes(self, **changes: Any) -> ModelConfig:
        """A copy with some fields replaced, checked again."""
        return replace(self, **changes)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; ModelError naming the file where it is missing or malformed."""
    if not path.is_file():
        raise ModelError(f"{path} is missing: {path.parent} is not a Hugging Face model folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """An `eos_token_id` style entry: null, a number or a list of numbers."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ModelError(f"token ids must be integers, got {value!r}")
    return tuple(values)


def _first(values: tuple[int, ...]) -> int | None:
    return values[0] if values else None


def _ids_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _check(config: ModelConfig) -> None:
    for key in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if getattr(config, key) < 1:
            raise ModelError(f"{key} must be at least 1, got {getattr(config, key)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ModelError(f"head_dim must be even for rotary embeddings, got {config.head_dim}")
    if len(config.layer_windows) != config.num_hidden_layers:
        raise ModelError(
            f"{len(config.layer_windows)} layer windows for {config.num_hidden_layers} layers"
        )
    if any(window is not None and window < 1 for window in config.layer_windows):
        raise ModelError(f"a sliding window must be at least 1, got {config.layer_windows}")
    if config.hidden_act not in ACTIVATIONS:
        raise ModelError(
            f"activation {config.hidden_act!r} is unknown; known: {', '.join(ACTIVATIONS)}"
        )


def _check_architecture(raw: Mapping[str, Any], kind: Family) -> None:
    names = raw.get("architectures")
    if names and kind.architecture not in names:
        raise ModelError(
            f"config.json: architectures is {names}, expected {kind.architecture}; only causal "
            "language models can be loaded"
        )


def _integer(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be a number, got {value!r}")
    return float(value)


def _flag(values: Mapping[str, Any], flag: bool | str) -> bool:
    if isinstance(flag, bool):
        return flag
    value = values.get(flag, False)
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {flag} must be true or false, got {value!r}")
    return value


def _activation(name: Any) -> str:
    return _ACTIVATION_ALIASES.get(name, name) if isinstance(name, str) else repr(name)


def _windows(kind: Family, values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if kind.sliding == "none" or values.get("sliding_window") is None:
        return (None,) * layers
    if kind.sliding == "by_layer" and not _flag(values, "use_sliding_window"):
        return (None,) * layers
    window = _integer(values, "sliding_window")
    if kind.sliding == "all":
        return (window,) * layers
    types = values.get("layer_types")
    if types is None:
        first = _integer(values, "max_window_layers")
        return tuple(window if i >= first else None for i in range(layers))
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(types, list) or len(types) != layers or not all(t in known for t in types):
        raise ModelError(
            f"config.json: layer_types must name {layers} layers, each one of {sorted(known)}; "
            f"got {types!r}"
        )
    return tuple(known[t] for t in types)


def _windows_to_hf(kind: Family, windows: tuple[int | None, ...]) -> dict[str, Any]:
    if kind.sliding == "none":
        if any(windows):
            raise ModelError(f"{kind.architecture} has no sliding window, got {windows}")
        return {}
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1 or (kind.sliding == "all" and len(set(windows)) > 1):
        raise ModelError(f"{kind.architecture} cannot describe the layer windows {windows}")
    size = sizes.pop() if sizes else None
    if kind.sliding == "all":
        return {"sliding_window": size}
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return {
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "layer_types": types,
    }


def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
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
    theta = _number(scaling, "rope_theta", _number(_present(raw), "rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    return RopeConfig(
        theta=theta, kind=kind, **_rope_scaling(kind, _present(scaling), max_positions)
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
    fields: dict[str, Any] = {k: _number(scaling, k, 0.0) for k in keys if k in scaling}
    if kind == "yarn" and "truncate" in scaling:
        fields["truncate"] = _flag(scaling, "truncate")
    if kind == "dynamic":
        # The growth is measured from the config's own length, whatever else it says.
        context = max_positions
    if kind != "linear":
        fields["original_max_position_embeddings"] = context
    return fields


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
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


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
