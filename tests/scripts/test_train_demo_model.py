"""The corpus, the training loop and the model that is shipped."""

import collections
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.demo_model import demo_model_path
from jq.models import Decoder, HFCheckpoint, ModelConfig, Tokenizer
from scripts import train_demo_model
from scripts.demo_model import bpe, corpus, record, training
from scripts.demo_model.corpus import Document
from scripts.demo_model.training import Settings, State

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def texts() -> corpus.Split:
    return corpus.build()


@pytest.fixture(scope="module")
def shipped():
    folder = demo_model_path()
    checkpoint = HFCheckpoint(folder, dtype=jnp.float32)
    return folder, Decoder(checkpoint.config), checkpoint.load()


# --- corpus


@pytest.mark.slow
def test_corpus_is_the_same_in_another_process(texts):
    """Another seed of string hashes, and none of what the tests put into this process."""
    program = (
        "from scripts.demo_model import corpus; import hashlib;"
        "print(hashlib.sha256(repr(corpus.build()).encode()).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == hashlib.sha256(repr(texts).encode()).hexdigest()


def test_documents_come_in_the_same_order(tmp_path):
    for name in ("b", "a/z", "a/__init__", "test/t"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'"""What {name} is for."""')
    names = [d.name for d in corpus.library_documents(tmp_path)]
    assert names == ["module/a", "module/a.z", "module/b"]


def test_corpus_has_topics_modules_and_builtins(texts):
    kinds = collections.Counter(
        d.name.split("/")[0] for part in texts for d in part if "\n" in d.text
    )
    assert set(kinds) == {"topic", "module", "builtin"}
    assert sum(len(d.text) for d in texts.train) > 1_500_000
    names = {d.name for part in texts for d in part}
    assert "module/json.decoder" in names
    assert not any("idlelib" in name or ".test." in name for name in names)


def test_held_out_documents_share_no_run_of_words_with_training(texts):
    def runs(documents):
        # Written anew: whatever `corpus.runs` does, this is what is promised.
        found = set()
        for document in documents:
            for paragraph in re.split(r"\n\s*\n", document.text):
                words = re.findall(r"\w+", paragraph.lower())
                found.update(zip(*(words[i:] for i in range(10)), strict=False))
        return found

    held_out = runs(texts.held_out)
    assert len(held_out) > 5000
    assert not held_out & runs(texts.train)
    assert not {d.name for d in texts.train} & {d.name for d in texts.held_out}


def test_held_out_is_large_enough_and_of_many_documents(texts):
    sizes = [len(d.text) for d in texts.held_out]
    assert sum(sizes) >= corpus.MIN_HELD_OUT
    assert max(sizes) < sum(sizes) / 5
    assert 0.03 < sum(sizes) / sum(len(d.text) for part in texts for d in part) < 0.10


def test_split_drops_what_training_documents_say_again():
    sentence = "one two three four five six seven eight nine ten eleven"
    documents = [Document(f"topic/{i}", f"{i} is here.\n\n" + "word " * 60) for i in range(40)]
    documents = [
        d._replace(text=d.text + f"\n\nsaid in all: {sentence}\n\n{d.name * 60}") for d in documents
    ]
    split = corpus.split(documents, 0.2, 0)
    assert split.held_out
    assert all(sentence in d.text for d in split.held_out)
    assert split.train
    assert not any(sentence in d.text for d in split.train)


def test_deduplicate_keeps_the_longer_document():
    paragraph = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda " * 5
    other = "a quite different text that goes on for rather more than ten words " * 5
    short, long = Document("topic/a", paragraph), Document("topic/b", f"{paragraph}\n\n{other}")
    assert corpus.deduplicate([short, long]) == [long]


def test_module_text_is_laid_out_as_help_does():
    source = b'''"""Top."""
class Shape(Base):
    """A shape."""
    def area(self, unit="m"):
        """Its area.

        In square units."""
    def hidden(self): pass
    async def again(self):
        """Its area.  In square units."""
'''
    text = corpus.module_text("shapes", source, set())
    assert text == (
        "Help on module shapes:\n\nTop.\n\nclass Shape(Base)\n    A shape.\n\n"
        "    area(self, unit='m')\n        Its area.\n\n        In square units."
    )
    assert corpus.module_text("broken", b"def (:", set()) == ""
    assert corpus.module_text("bare", b"x = 1", set()) == ""


# --- tokenizer


def test_tokenizer_is_deterministic_and_loses_nothing(tmp_path):
    documents = corpus.topics()[:10]
    first, second = (bpe.train_tokenizer((d.text for d in documents), 512) for _ in range(2))
    assert first.to_str() == second.to_str()
    bpe.save_tokenizer(first, tmp_path, 256)
    loaded = Tokenizer(tmp_path)
    text = "def \N{GREEK SMALL LETTER LAMDA}(x):\n        return  '\N{SNOWMAN}'\t\x00"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token_ids == (bpe.END_ID,)
    stream = bpe.encode(first, documents)
    assert stream.dtype == np.int32
    assert (stream == bpe.END_ID).sum() == len(documents)


# --- training

TINY = Settings(steps=40, batch_size=4, seq_len=16, learning_rate=2e-2, warmup=4, weight_decay=0.01)


def tiny_config() -> ModelConfig:
    shape = train_demo_model.Shape(32, 32, 64, layers=1, heads=2, kv_heads=1, context=16)
    return shape.config()


def tiny_stream() -> np.ndarray:
    """A cycle with a few wrong turns: far from uniform, and not to be learnt from counts alone."""
    rng = np.random.default_rng(0)
    steps = np.where(rng.random(2000) < 0.9, 7, rng.integers(0, 32, 2000))
    return (np.cumsum(steps) % 32).astype(np.int32)


@pytest.mark.loose_promotion
def test_training_learns_and_goes_on_where_it_stopped(tmp_path):
    config, stream = tiny_config(), tiny_stream()
    losses = []

    def report(state, loss):
        losses.append(loss)
        if state.step == 20:
            training.save_state(state, tmp_path / "state.npz")

    whole = training.train(config, stream, TINY, every=10, report=report)
    assert losses[0] > 2.5
    assert losses[-1] < 0.6 * losses[0]
    model = Decoder(config)
    stopped = training.load_state(tmp_path / "state.npz", training.start(model, TINY))
    assert stopped.step == 20
    resumed = training.train(config, stream, TINY, state=stopped)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    held_out = training.held_out_loss(model, whole.params, stream[:512], TINY.seq_len)
    assert held_out < 0.6 * losses[0]


def test_state_of_another_model_is_refused(tmp_path):
    state, other = (State(3, {"kernel": jnp.zeros((n, 2))}, ()) for n in (4, 8))
    training.save_state(state, tmp_path / "state.npz")
    assert training.load_state(tmp_path / "state.npz", state).step == 3
    with pytest.raises(ValueError, match="another model"):
        training.load_state(tmp_path / "state.npz", other)


def test_an_epoch_visits_every_token_once():
    settings = dataclasses.replace(TINY, batch_size=3)
    stream = np.arange(12 * 16, dtype=np.int32)
    epochs = [[training.windows(stream, settings, 4 * e + i) for i in range(4)] for e in range(2)]
    for epoch in epochs:
        inputs = np.concatenate(epoch)[:, :-1]
        np.testing.assert_array_equal(np.sort(inputs.ravel()), stream)
        targets = np.concatenate(epoch)[:, 1:]
        np.testing.assert_array_equal(targets, (inputs + 1) % len(stream))
    assert not np.array_equal(epochs[0], epochs[1])
    with pytest.raises(ValueError, match="less than one batch"):
        training.windows(stream[:40], settings, 0)


def test_held_out_loss_of_equal_logits_is_log_of_the_vocabulary():
    model = Decoder(tiny_config())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    loss = training.held_out_loss(model, params, tiny_stream()[:100], 16)
    np.testing.assert_allclose(loss, np.log(32), rtol=1e-6)


def test_seconds_add_up_over_resumed_runs():
    assert record.sum_of_runs([{"seconds": s} for s in (1.0, 2.0, 0.5, 3.0)]) == 5.0


def test_record_says_which_steps_ran_under_other_settings():
    before, after = (dataclasses.asdict(dataclasses.replace(TINY, steps=n)) for n in (90, 60))
    log = [{"step": s, "settings": before} for s in (10, 20)] + [{"step": 60, "settings": after}]
    text = record.settings_text(dataclasses.replace(TINY, steps=60), log)
    assert text.splitlines()[0].startswith("* steps 60, batch_size 4")
    assert text.splitlines()[1:] == ["* up to step 20 with steps 90, then resumed"]
    same = record.settings_text(dataclasses.replace(TINY, steps=60), log[-1:])
    assert len(same.splitlines()) == 1
    unknown = record.settings_text(TINY, [{"step": 5}])
    assert unknown.splitlines()[1:] == ["* up to step 5 the settings were not recorded"]


# --- the shipped model


def test_shipped_folder_is_small_and_complete(shipped):
    folder, model, _ = shipped
    sizes = {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()}
    assert set(sizes) >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "evaluation.txt",
        "calibration.txt",
        "README.md",
    }
    assert sum(sizes.values()) <= 8_000_000
    assert sizes["evaluation.txt"] >= 60_000
    config = model.config
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert Tokenizer(folder).vocab_size == config.vocab_size
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def stated_perplexities(folder) -> tuple[float, float]:
    rows = re.findall(
        r"^\| (?:bfloat16|3 bits).*\| ([0-9.]+) \|$", (folder / "README.md").read_text(), re.M
    )
    first, second = map(float, rows)
    return first, second


def test_shipped_perplexity_is_what_its_readme_says(shipped):
    folder, model, params = shipped
    tokens = train_demo_model.evaluation_tokens(folder)
    window = model.config.max_position_embeddings
    loss = training.held_out_loss(model, params, tokens, window)
    rounded = training.held_out_loss(model, record.round_to_nearest(params), tokens, window)
    stated, stated_rounded = stated_perplexities(folder)
    np.testing.assert_allclose(np.exp(loss), stated, rtol=0.01)
    np.testing.assert_allclose(np.exp(rounded), stated_rounded, rtol=0.01)
    assert np.exp(rounded - loss) > 1.03
