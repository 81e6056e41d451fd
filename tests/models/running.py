"""What the tests of the decoder share."""

from functools import partial

import jax
import numpy as np

TOKENS = np.random.default_rng(1).integers(0, 64, (2, 14), dtype=np.int32)

# Configs that between them have all code paths of a block.
VARIED = ["llama3", "llama-bias-gelu", "mistral-window", "qwen2", "qwen3-layers"]


def relative_error(got, want):
    """Largest difference over the reference's standard deviation."""
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / np.std(want)


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, **options):
    return model.apply({"params": params}, tokens, **options)
