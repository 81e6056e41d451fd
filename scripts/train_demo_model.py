"""Train the small language model that is shipped as `jq/demo_model`.

    python scripts/train_demo_model.py --out DIR

Everything comes from the running Python: language topics and docstrings of the standard library.
A run that was stopped goes on from its last checkpoint (`DIR/training.npz`) when started again,
under the options it is then given; README.md says which steps ran under which.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: find scripts.*

from jq.models import Decoder, HFCheckpoint, ModelConfig, Tokenizer, save_hf
from scripts.demo_model import bpe, corpus, record, training
from scripts.demo_model.training import Settings, State

CALIBRATION_CHARACTERS = 250_000
STATE_FILE = "training.npz"
LOG_FILE = "training.jsonl"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of the model; everything a linear reads is a multiple of 128, so groups of 128 fit."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 512

    def config(self) -> ModelConfig:
        return ModelConfig(
            model_type="llama",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            eos_token_ids=(bpe.END_ID,),
            bos_token_id=bpe.END_ID,
        )


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train the demonstration model.

    out: folder to write the model to.
    every: steps between progress lines.
    save_every: steps between checkpoints; each also measures the held-out loss.
    """

    out: Path
    shape: Shape = Shape()
    training: Settings = Settings()
    every: int = 50
    save_every: int = 200


def prepare(arguments: Arguments) -> np.ndarray:
    """Write tokenizer and texts into the folder; returns the training tokens, int32 `[n]`."""
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    texts = corpus.build()
    train, held_out = corpus.shuffled(texts.train), corpus.shuffled(texts.held_out)
    tokenizer = bpe.train_tokenizer((d.text for d in train), arguments.shape.vocab_size)
    bpe.save_tokenizer(tokenizer, out, arguments.shape.context)
    (out / "evaluation.txt").write_text(corpus.joined(held_out), encoding="utf-8")
    sample = corpus.joined(corpus.sample(train, CALIBRATION_CHARACTERS))
    (out / "calibration.txt").write_text(sample, encoding="utf-8")
    stream = bpe.encode(tokenizer, train)
    characters = sum(len(d.text) for d in train)
    print(
        f"{len(train)} documents, {characters} characters, {len(stream)} tokens to train on; "
        f"{len(held_out)} documents, {sum(len(d.text) for d in held_out)} characters held out"
    )
    return stream


def evaluation_tokens(folder: Path) -> np.ndarray:
    """int32 `[n]`: `evaluation.txt` as the folder's tokenizer reads it."""
    text = (folder / "evaluation.txt").read_text(encoding="utf-8")
    return np.array(Tokenizer(folder).encode(text), np.int32)


def run(arguments: Arguments) -> None:
    """Prepare, train or go on training, save in bfloat16, measure what was saved, write README."""
    stream = prepare(arguments)
    out, settings, config = arguments.out, arguments.training, arguments.shape.config()
    held_out = evaluation_tokens(out)
    model = Decoder(config)
    state = training.start(model, settings)
    if (out / STATE_FILE).exists():
        state = training.load_state(out / STATE_FILE, state)
        print(f"going on from step {state.step}")
    else:
        (out / LOG_FILE).unlink(missing_ok=True)
    progress = training.Progress(settings, state.step)

    def report(state: State, loss: float) -> None:
        heard = None
        if state.step % arguments.save_every == 0 or state.step == settings.steps:
            heard = training.held_out_loss(model, state.params, held_out, settings.seq_len)
        line = progress.line(state.step, loss, heard)
        print(line, flush=True)
        if heard is not None:
            entry = {
                "step": state.step,
                "loss": loss,
                "held_out": heard,
                "seconds": progress.seconds(),
                "settings": dataclasses.asdict(settings),
            }
            with (out / LOG_FILE).open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            training.save_state(state, out / STATE_FILE)

    state = training.train(
        config, stream, settings, state=state, every=arguments.every, report=report
    )
    finish(arguments, state, len(stream))


def finish(arguments: Arguments, state: State, train_tokens: int) -> None:
    """Save the model in bfloat16, measure it as saved, and write its README."""
    out, settings, config = arguments.out, arguments.training, arguments.shape.config()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    save_hf(half, config, out, overwrite=True)
    checkpoint = HFCheckpoint(out, dtype=jnp.float32)
    params, tokens = checkpoint.load(), evaluation_tokens(out)
    loss = training.held_out_loss(Decoder(config), params, tokens, arguments.shape.context)
    rounded = record.round_to_nearest(params)
    worse = training.held_out_loss(Decoder(config), rounded, tokens, arguments.shape.context)
    log = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
    text = record.readme(config, settings, log, train_tokens, len(tokens), loss, worse)
    (out / "README.md").write_text(text, encoding="utf-8")
    for name in (STATE_FILE, LOG_FILE):
        (out / name).unlink(missing_ok=True)
    print(f"held-out perplexity {np.exp(loss):.3f}; 3-bit RTN {np.exp(worse):.3f}; saved in {out}")


def main() -> None:
    began = time.perf_counter()
    run(tyro.cli(Arguments, description=__doc__))
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
