"""Model configuration, read from and written to Hugging Face `config.json`.

Only data is read: `auto_map` and other references to code are ignored, and never executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jq.errors import ModelError
from jq.models.families import FAMILIES, Family, family
from jq.models.hf_rope import rope_from_hf, rope_to_hf
from jq.models.hf_values import flag, integer, number, read_json, token_ids
from jq.models.rope import RopeConfig

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
        sizes = {key: integer(values, key) for key in _REQUIRED}
        heads = sizes["num_attention_heads"]
        if "head_dim" not in values and sizes["hidden_size"] % max(heads, 1):
            raise ModelError(
                f"config.json: hidden_size {sizes['hidden_size']} is not a multiple of "
                f"num_attention_heads {heads}, and there is no head_dim"
            )
        max_positions = integer(values, "max_position_embeddings")
        return cls(
            model_type=raw["model_type"],
            **sizes,
            num_key_value_heads=integer(
                {"num_key_value_heads": heads} | values, "num_key_value_heads"
            ),
            head_dim=integer(
                {"head_dim": sizes["hidden_size"] // max(heads, 1)} | values, "head_dim"
            ),
            hidden_act=_activation(values.get("hidden_act", "silu")),
            max_position_embeddings=max_positions,
            rms_norm_eps=number(values, "rms_norm_eps", 1e-6),
            rope=rope_from_hf(raw, max_positions),
            layer_windows=_windows(kind, values, sizes["num_hidden_layers"]),
            qkv_bias=flag(values, kind.qkv_bias),
            o_bias=flag(values, kind.o_bias),
            mlp_bias=flag(values, kind.mlp_bias),
            qk_norm=kind.qk_norm,
            tie_word_embeddings=flag(values, "tie_word_embeddings"),
            eos_token_ids=token_ids(values.get("eos_token_id")),
            bos_token_id=_first(token_ids(values.get("bos_token_id"))),
            pad_token_id=_first(token_ids(values.get("pad_token_id"))),
            initializer_range=number(values, "initializer_range", 0.02),
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read `<path>/config.json`; ModelError, naming it, where it is missing or is not JSON, and
        as `from_hf`."""
        file = Path(path) / "config.json"
        raw = read_json(file)
        try:
            return cls.from_hf(raw)
        except ModelError as error:
            text = str(error).removeprefix("config.json").removeprefix(":")
            raise ModelError(f"{file}: {text.lstrip()}") from error

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
            "rope_scaling": rope_to_hf(self.rope),
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": _ids_to_hf(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        for key, value in (
            (kind.qkv_bias, self.qkv_bias),
            (kind.o_bias, self.o_bias),
            (kind.mlp_bias, self.mlp_bias),
        ):
            if isinstance(key, str):
                raw[key] = value
        return raw | _windows_to_hf(kind, self.layer_windows)

    def with_changes(self, **changes: Any) -> ModelConfig:
        """A copy with some fields replaced, checked again."""
        return replace(self, **changes)


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


def _activation(name: Any) -> str:
    return _ACTIVATION_ALIASES.get(name, name) if isinstance(name, str) else repr(name)


def _windows(kind: Family, values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if kind.sliding == "none" or values.get("sliding_window") is None:
        return (None,) * layers
    if kind.sliding == "by_layer" and not flag(values, "use_sliding_window"):
        return (None,) * layers
    window = integer(values, "sliding_window")
    if kind.sliding == "all":
        return (window,) * layers
    types = values.get("layer_types")
    if types is None:
        first = integer(values, "max_window_layers")
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
