"""From a folder to a model that runs, and back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import tree
from jq.api import load, save
from jq.checkpoint import read_manifest
from jq.errors import CheckpointError, ModelError, OutputError
from jq.methods.rtn import rtn_quantize
from jq.models import Decoder, ModelConfig, save_hf
from jq.spec import w4a16
from tests.checkpoint.trees import assert_same

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
SPEC = w4a16(8)
TOKENS = jnp.asarray([[1, 5, 9, 2, 30]])
MODEL = Decoder(CONFIG, param_dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def plain():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def quantized(plain):
    """Two linears of each block in int4."""
    params = plain
    for path, leaf in tree.leaves(plain):
        if path.endswith(("o_proj/kernel", "down_proj/kernel")):
            packed = rtn_quantize(leaf, SPEC).to_qtensor(SPEC)
            params = tree.replace(params, path, packed)
    return params


@pytest.fixture(scope="module")
def sound(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "q"
    save(path, MODEL, quantized, meta={"recipe": "rtn"}, report={"layers_0": {"error": 0.1}})
    return path


def logits(model, params):
    return np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))


def test_a_quantized_model_comes_back_and_runs(sound, quantized):
    model, params = load(sound)
    assert model.config == CONFIG
    assert_same(params, quantized)
    np.testing.assert_array_equal(logits(model, params), logits(MODEL, quantized))
    assert read_manifest(sound).meta == {"recipe": "rtn"}


def test_dtype_of_activations(sound):
    assert load(sound)[0].dtype == jnp.float32  # on a CPU
    assert load(sound, dtype=jnp.bfloat16)[0].dtype == jnp.bfloat16


def test_a_hugging_face_folder(plain, tmp_path):
    save_hf(plain, CONFIG, tmp_path / "hf")
    model, params = load(tmp_path / "hf")
    assert model.config == CONFIG
    assert_same(params, plain)
    asked = []

    def shardings(path, shape):
        asked.append((path, shape))
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    assert_same(load(tmp_path / "hf", shardings=shardings)[1], plain)
    assert ("layers_1/mlp/up_proj/kernel", (16, 24)) in asked


def test_config_files_of_the_original(plain, quantized, tmp_path):
    save_hf(plain, CONFIG, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    save(tmp_path / "q", MODEL, quantized, config_files_from=tmp_path / "hf")
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert_same(load(tmp_path / "q")[1], quantized)
    with pytest.raises(OutputError, match="not empty"):
        save(tmp_path / "q", MODEL, quantized)
    save(tmp_path / "q", MODEL, plain, overwrite=True)
    assert_same(load(tmp_path / "q")[1], plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 32}, r"mlp/gate_proj/kernel: expected shape \(16, 32\).*\(16, 24\)"),
        ({"vocab_size": 64}, r"embed/embedding: expected shape \(64, 16\).*\(32, 16\)"),
        ({"num_hidden_layers": 3}, r"missing \(9\): layers_2/input_norm/scale"),
        ({"num_hidden_layers": 1}, r"unexpected \(9\): layers_1/"),
        ({"tie_word_embeddings": True}, r"unexpected \(1\): lm_head/kernel"),
        ({"rms_norm_eps": 1.0}, r"config\.json is not what was written"),
    ],
)
def test_a_config_that_lies(sound, tmp_path, changes, words):
    copy = shutil.copytree(sound, tmp_path / "q")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=words):
        load(copy)


def test_remote_code_is_not_run(sound, tmp_path):
    copy = shutil.copytree(sound, tmp_path / "q")
    config = json.loads((copy / "config.json").read_text())
    canary = tmp_path / "canary"
    (copy / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    auto_map = {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (copy / "config.json").write_text(json.dumps(config | auto_map))
    with pytest.raises(CheckpointError, match=r"config\.json is not what was written"):
        load(copy)
    assert not canary.exists()


def test_no_model_there(sound, tmp_path):
    with pytest.raises(ModelError, match="not a folder"):
        load(tmp_path / "nowhere")
    copy = shutil.copytree(sound, tmp_path / "q")
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load(copy)


def test_parameters_of_another_model(plain, tmp_path):
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): extra/scale"):
        save(tmp_path / "q", MODEL, {**plain, "extra": {"scale": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match=r"embed/embedding: expected shape \(32, 16\)"):
        save(tmp_path / "q", MODEL, {**plain, "embed": {"embedding": None}})
    assert not (tmp_path / "q").exists()
