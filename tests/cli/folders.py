"""A tiny random model folder with a tokenizer and a text, as the command line meets them."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.models import checkpoints

RAW = checkpoints.CONFIGS["llama1"] | {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,  # so that groups of linears come in two shapes, which compile once
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "eos_token_id": 0,
}
LAYERS = RAW["num_hidden_layers"]
LINEARS = 7 * LAYERS
WORDS = ("the", "flies", "fly", "around", "a", "cafe", "twice", "and", "café", "again")


def write_model(folder: Path, **changes) -> Path:
    """config.json, model.safetensors and the tokenizer's files."""
    checkpoints.write(folder, RAW | changes)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


def write_text(path: Path, words: int = 400) -> Path:
    """Some words in random order."""
    chosen = np.random.default_rng(0).choice(WORDS, words)
    path.write_text(" ".join(chosen), encoding="utf-8")
    return path
