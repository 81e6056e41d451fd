"""What the client programs share.  They run in environments without JAX, and import nothing else of
this repository."""

import os
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    GPTQMODEL_CPU_WORKERS="2",
    CUDA_VISIBLE_DEVICES="",
)

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

torch.set_num_threads(int(os.environ.get("JAXQ_INTEROP_THREADS", "2")))


def load_arguments():
    """(tokens int64 [B, T], output folder, model folders) of `PROGRAM TOKENS OUT FOLDER...`."""
    tokens, out, *folders = sys.argv[1:]
    return torch.from_numpy(np.load(tokens).astype(np.int64)), Path(out), [Path(f) for f in folders]


def make_arguments():
    """(model folder, tokens int64 [B, T], output folder) of `PROGRAM MODEL TOKENS OUT`."""
    model, tokens, out = sys.argv[1:]
    return Path(model), torch.from_numpy(np.load(tokens).astype(np.int64)), Path(out)


def watched(name):
    """Whether a module's weights are compared: the linears of the first block."""
    return name.startswith("model.layers.0.") and name.endswith("_proj")


def save(out, folder, logits, weights, plain=None):
    """Write logits and weights (module -> [out, in]) as OUT/<folder's name>.npz; `plain` are the
    logits with activations in full precision, where the tool otherwise quantizes them."""
    arrays = {"logits": logits, **weights, **({} if plain is None else {"plain": plain})}
    arrays = {name: a.detach().to(torch.float32).numpy() for name, a in arrays.items()}
    np.savez(out / f"{folder.name}.npz", **arrays)
    print(folder.name, flush=True)
