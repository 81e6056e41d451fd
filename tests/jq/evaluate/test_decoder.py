"""Evaluation of the library's own decoder, and of a trained model where its data is present."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.calib import token_stream
from jq.evaluate import evaluate
from jq.methods.rtn import rtn_quantize
from jq.models import Decoder, HFCheckpoint, ModelConfig, Tokenizer
from jq.spec import QuantSpec
from tests.oracles import evaluation as oracle

T = 24
DATA = Path(os.environ.get("JAXQ_REFERENCE_DATA", Path(__file__).parents[4] / "shared")) / "data"


@pytest.fixture(scope="module")
def model():
    """Two kinds of block: sliding window and full attention."""
    config = ModelConfig(
        model_type="llama",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_windows=(5, None),
    )
    return Decoder(config)


@pytest.fixture(scope="module")
def params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 61, (4, T)).astype(np.int32)


def quantized(params):
    """Every linear of every block at 4 bits."""

    spec = QuantSpec("int4", group_size=16)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        linear = "layers_" in name and "kernel" in name
        return rtn_quantize(x, spec).to_qtensor(spec) if linear else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def test_scores_are_those_of_the_models_logits(model, params, tokens):
    small = quantized(params)
    got = evaluate(model, small, tokens, reference_params=params, seq_len=T, batch_size=2)
    apply = jax.jit(model.apply)
    logits = np.asarray(apply({"params": small}, tokens))
    reference = np.asarray(apply({"params": params}, tokens))
    windows = [oracle.window_scores(*w) for w in zip(tokens, logits, reference, strict=True)]
    nll, kl, same = ([oracle.mean(w[i]) for w in windows] for i in range(3))
    np.testing.assert_allclose(got.window_nll, nll, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(got.window_kl), kl, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(got.window_top1), same, rtol=1e-12)
    assert min(kl) > 1e-4


def test_bfloat16(model, params, tokens):
    narrow = Decoder(model.config, dtype=jnp.bfloat16)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got: Any = evaluate(
        narrow, halves, tokens, reference_params=halves, reference_model=model, seq_len=T
    )
    assert 0 < np.asarray(got.window_kl).max() < 0.05
    assert got.perplexity.value == pytest.approx(got.reference_perplexity.value, rel=0.05)


@pytest.fixture(scope="module")
def trained():
    folder, text = DATA / "ref-llama", DATA / "text" / "wikitext2-valid.txt"
    if not (folder.is_dir() and text.is_file()):
        pytest.skip("no reference data")
    checkpoint = HFCheckpoint(folder)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), checkpoint.load())
    config = checkpoint.config
    stream = token_stream(text, encode=Tokenizer(folder).encode, vocab_size=config.vocab_size)
    return Decoder(config), params, stream


@pytest.mark.slow
def test_trained_model(trained):
    """What transformers makes of the same windows: mean NLL and its standard error."""
    model, params, stream = trained
    got = evaluate(model, params, stream, seq_len=512, max_windows=100, batch_size=4)
    assert np.log(got.perplexity.value) == pytest.approx(3.81582207, rel=1e-6)
    assert got.perplexity.stderr / got.perplexity.value == pytest.approx(0.0263161, rel=1e-5)


@pytest.mark.slow
def test_quantization_costs_a_trained_model(trained):
    """A difference in pairs that the perplexity's own error would drown."""
    model, params, stream = trained
    got: Any = evaluate(
        model, quantized(params), stream, reference_params=params, seq_len=512, max_windows=16
    )
    increase = got.perplexity_increase
    assert increase.value > 4 * increase.stderr
    assert increase.value < got.perplexity.stderr
    assert 0.001 < got.kl.value < 0.1
    assert 0.8 < got.top1_agreement.value < 0.99
