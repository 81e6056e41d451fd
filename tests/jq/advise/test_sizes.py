"""The size calculator against published parameter counts and against real arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq
from jq.advise.known import CONFIGS, find_model
from jq.advise.sizes import (
    group_size,
    kv_bytes_per_token,
    largest_linear,
    parameters,
    weight_bytes,
)
from jq.errors import ModelError
from jq.models import Decoder, ModelConfig
from jq.models.cache import init_cache
from jq.oneshot import quantize
from jq.presets import preset
from jq.recipe import uniform

# Tensor sizes of the published checkpoints, added up; models that share a tensor count it once.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def test_every_known_model_has_a_published_count():
    assert set(CONFIGS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_exact(name):
    assert parameters(find_model(name)[1]).total == PUBLISHED[name]


@pytest.mark.parametrize("name", ["llama-2-70b", "llama-3-70b"])
def test_sizes_of_70b_models(name):
    """Weights of the blocks, 68.45 G in both: 4.125 bits symmetric, 4.15625 with zero points."""
    config = find_model(name)[1]
    counted = parameters(config)
    assert counted.linear == 68_451_041_280
    rest = 2 * (counted.total - counted.linear)
    blocks = {
        (bits, symmetric): weight_bytes(config, jq.QuantSpec(f"int{bits}", 128, symmetric)) - rest
        for bits in (3, 4)
        for symmetric in (True, False)
    }
    assert blocks[4, True] == 68_451_041_280 * 4.125 / 8
    assert blocks[4, False] == 68_451_041_280 * 4.15625 / 8
    assert blocks[3, True] == 68_451_041_280 * 3.125 / 8
    assert blocks[3, False] == 68_451_041_280 * (3 + 19 / 128) / 8
    # The rule of thumb, for 69 G weights.
    assert [round(69 * bits / 8, 1) for bits in (4.125, 4.15625, 3 + 19 / 128)] == [
        35.6,
        35.8,
        27.2,
    ]
    assert weight_bytes(config, None) == 2 * PUBLISHED[name]


def test_cache_per_token():
    assert kv_bytes_per_token(find_model("llama-2-70b")[1]) == 327_680  # 0.328 MB
    assert kv_bytes_per_token(find_model("llama-2-7b")[1]) == 524_288
    assert kv_bytes_per_token(find_model("llama-3-8b")[1]) == 131_072


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_the_decoder(kind, tied):
    config = ModelConfig.from_hf(TINY | {"model_type": kind, "tie_word_embeddings": tied})
    model = Decoder(config, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    leaves = jax.tree.leaves(shapes)
    assert parameters(config).total == sum(leaf.size for leaf in leaves)
    assert weight_bytes(config, None) == sum(leaf.size * 2 for leaf in leaves)
    cache = jax.eval_shape(lambda: init_cache(config, 3, 5, jnp.bfloat16))
    held = sum(leaf.size * 2 for leaf in (*cache.keys, *cache.values))
    assert kv_bytes_per_token(config) * 3 * 5 == held


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtn", {"bits": 4, "group_size": 32}),
        ("rtn", {"bits": 3, "group_size": 16, "symmetric": True}),
        ("rtn", {"bits": 8, "group_size": 32}),
        ("int8", {}),
        ("fp8", {}),
    ],
)
def test_bytes_are_those_of_quantized_arrays(name, options):
    config = ModelConfig.from_hf(TINY | {"model_type": "llama", "attention_bias": False})
    spec, method = preset(name, **options)
    model = Decoder(config, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)["params"]
    layer = quantize(params["layers_0"], uniform(spec, method))
    held = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(layer))
    held += sum(params[key][leaf].nbytes for key, leaf in OUTER)
    assert weight_bytes(config, spec) == held
    with_order = weight_bytes(config, spec, act_order=True)
    assert with_order - held == 2 * 4 * (64 * 5 + 32 + 96)  # q, k, v, gate, up; o; down


OUTER = (("embed", "embedding"), ("final_norm", "scale"), ("lm_head", "kernel"))


def test_group_size_divides_every_linear():
    assert {group_size(find_model(name)[1]) for name in CONFIGS} == {128}
    half = ModelConfig.from_hf(TINY | {"model_type": "llama"})
    assert group_size(half) == 32  # of 64, 32 and 96 inputs
    assert largest_linear(find_model("llama-2-70b")[1]) in {(8192, 28672), (28672, 8192)}
    odd = ModelConfig.from_hf(TINY | {"model_type": "llama", "intermediate_size": 90})
    assert group_size(odd) == -1


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("llama-70b", "llama-2-70b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Llama3-8B", "llama-3-8b"),
    ],
)
def test_models_go_by_their_usual_names(spelled, name):
    assert find_model(spelled)[0] == name


def test_unknown_models_are_refused_with_the_known_ones():
    with pytest.raises(ModelError, match="known: llama-7b, "):
        find_model("gpt-2")


def test_a_folder_is_a_model_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="vocab_size"):
        find_model(str(tmp_path))
