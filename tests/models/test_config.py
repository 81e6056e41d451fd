"""Reading and writing config.json."""

import json

import pytest

from jq.errors import ModelError
from jq.models.config import ModelConfig
from jq.models.rope import RopeConfig
from tests.models.checkpoints import CONFIGS

LLAMA = CONFIGS["llama3"]
QWEN = CONFIGS["qwen2-window"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_writing_and_reading(name):
    config = ModelConfig.from_hf(CONFIGS[name])
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(ModelConfig.from_hf(CONFIGS[name]))


def test_silent_keys_take_the_familys_values():
    config = ModelConfig.from_hf(CONFIGS["llama1"])
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert config.rope == RopeConfig(theta=10000.0)
    assert not config.qkv_bias
    mistral = {k: v for k, v in CONFIGS["mistral-window"].items() if k != "sliding_window"}
    assert ModelConfig.from_hf(mistral).layer_windows == (4096, 4096)
    assert ModelConfig.from_hf(CONFIGS["mistral-full"]).layer_windows == (None, None)
    qwen3 = {k: v for k, v in CONFIGS["qwen3"].items() if k != "head_dim"}
    assert ModelConfig.from_hf(qwen3).head_dim == 128
    assert ModelConfig.from_hf(CONFIGS["qwen2"]).qkv_bias


def test_null_is_a_missing_key_but_for_the_window():
    config = ModelConfig.from_hf(LLAMA | {"head_dim": None, "rms_norm_eps": None})
    assert (config.head_dim, config.rms_norm_eps) == (8, 1e-6)


def test_which_layers_have_windows():
    assert ModelConfig.from_hf(QWEN).layer_windows == (None, 4)
    off = QWEN | {"use_sliding_window": False}
    assert ModelConfig.from_hf(off).layer_windows == (None, None)
    types = QWEN | {"layer_types": ["sliding_attention", "full_attention"]}
    assert ModelConfig.from_hf(types).layer_windows == (4, None)


def test_old_and_new_rope_keys_mean_the_same():
    old = ModelConfig.from_hf(LLAMA)
    new = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    new["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": LLAMA["rope_theta"]}
    assert ModelConfig.from_hf(new) == old
    assert old.rope.kind == "llama3"
    assert old.rope.original_max_position_embeddings == 32
    legacy = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelConfig.from_hf(legacy).rope == RopeConfig(theta=5e5, kind="linear", factor=2.0)


def test_token_ids_are_one_or_many():
    config = ModelConfig.from_hf(LLAMA | {"eos_token_id": [2, 5], "bos_token_id": 1})
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((2, 5), 1, None)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_hf(LLAMA | {"eos_token_id": 3}).eos_token_ids == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is unknown; known: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "no model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM"),
        ({"hidden_size": "32"}, "hidden_size must be an integer, got '32'"),
        ({"vocab_size": None}, "vocab_size must be an integer, got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "32 is not a multiple of .* 5"),
        ({"head_dim": 7}, "head_dim must be even .* got 7"),
        ({"hidden_act": "mish"}, "'mish' is unknown; known: silu"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"eos_token_id": "</s>"}, "token ids must be integers"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is unknown; known: default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs a factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor > 0"),
        ({"rope_scaling": [1]}, "rope parameters must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(LLAMA | changes)


def test_bad_layer_types_are_refused():
    with pytest.raises(ModelError, match="layer_types must name 2 layers"):
        ModelConfig.from_hf(QWEN | {"layer_types": ["full_attention"]})
    with pytest.raises(ModelError, match="layer_types must name 2 layers"):
        ModelConfig.from_hf(QWEN | {"layer_types": ["full_attention", "chunked_attention"]})


def test_a_config_that_the_family_cannot_say_is_not_written():
    config = ModelConfig.from_hf(LLAMA).with_changes(layer_windows=(4, None))
    with pytest.raises(ModelError, match="no sliding window"):
        config.to_hf()


def test_code_in_a_config_is_never_executed(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    raw = LLAMA | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_hf(LLAMA)
    assert not canary.exists()


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "JSON object")])
def test_a_broken_file_is_refused(tmp_path, text, message):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_folder(tmp_path)
