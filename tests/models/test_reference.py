"""A really trained model, where the reference data is there."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.models.decoder import Decoder
from jq.models.hf_weights import HFCheckpoint
from jq.models.tokenizer import Tokenizer

_ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("JAXQ_REFERENCE_DATA", _ROOT.parent / "shared")) / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "ref-llama").is_dir(), reason="no reference data"),
]


def test_perplexity_of_the_reference_model():
    checkpoint = HFCheckpoint(DATA / "ref-llama")
    params, model = checkpoint.load(), Decoder(checkpoint.config)
    text = (DATA / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
    ids = np.asarray(Tokenizer(DATA / "ref-llama").encode(text), np.int32)
    windows = ids[: len(ids) // 512 * 512].reshape(-1, 512)
    # Every fourth window: the whole text's perplexity of 48.6 within its sampling error.
    windows = windows[: len(windows) // 16 * 16 : 4]

    @jax.jit
    def nll(params, tokens):
        logits: Any = model.apply({"params": params}, tokens)
        logp = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))

    losses = [float(nll(params, windows[i : i + 4])) for i in range(0, len(windows), 4)]
    print(np.exp(np.mean(losses)))
    assert abs(np.exp(np.mean(losses)) / 48.6 - 1) < 0.03
