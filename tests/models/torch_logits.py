"""Logits of transformers' own models.  A program of its own, so that torch and JAX never meet.

    python torch_logits.py FOLDER...

Each folder is a model with tokens.npy int [B, T]; writes logits.npy float32 [B, T, V] beside it.
"""

import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]


def main(folders):
    for folder in map(Path, folders):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
        with torch.no_grad():
            # One row at a time: rotary embeddings of the dynamic kind look at the whole batch.
            rows = [model(tokens[i : i + 1]).logits[0].numpy() for i in range(len(tokens))]
        np.save(folder / "logits.npy", np.stack(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
