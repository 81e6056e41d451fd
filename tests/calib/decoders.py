"""Tiny random decoders, and how a driver's result is read: shared by the tests of the driver."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq import tree
from jq.models.config import ModelConfig
from jq.models.decoder import Decoder
from jq.models.hf_names import weight_table
from jq.qtensor import QTensor
from tests.models import checkpoints
from tests.oracles import blockwise

SAMPLES, LENGTH, VOCAB = 4, 16, 64

# A linear's name in a checkpoint -> in the parameter tree.
PATHS = {
    name: f"{'attention' if 'attn' in name else 'mlp'}/{name.split('.')[1]}"
    for names in blockwise.GROUPS.values()
    for name in names
}


@functools.cache
def make(
    name: str = "llama3", layers: int = 2, seed: int = 0
) -> tuple[Decoder, dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """(model, float32 params, raw config, checkpoint weights [out, in])."""
    raw = checkpoints.CONFIGS[name] | {"num_hidden_layers": layers}
    weights = checkpoints.random_weights(raw, seed)
    config = ModelConfig.from_hf(raw)
    params: dict[str, Any] = {}
    for entry in weight_table(config):
        value = weights[entry.key]
        params = tree.replace(
            params, entry.path, jnp.asarray(value.T if entry.transpose else value)
        )
    return Decoder(config), params, raw, weights


def tokens(samples: int = SAMPLES, length: int = LENGTH, seed: int = 7) -> np.ndarray:
    """int32 [samples, length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (samples, length), dtype=np.int32)


def qtensors(params: Any) -> dict[str, QTensor]:
    """Path of the linear -> its quantized kernel."""
    found = tree.leaves(params)
    return {p.removesuffix("/kernel"): w for p, w in found if isinstance(w, QTensor)}


def kernel(params: Any, linear: str) -> np.ndarray:
    """A kernel that was left in full precision."""
    return np.asarray(tree.get(params, f"{linear}/kernel"))


def same(left: Any, right: Any) -> bool:
    """Whether two parameter trees hold the same bits."""
    left, right = (dict(tree.leaves(t)) for t in (left, right))
    if left.keys() != right.keys():
        return False
    return all(_bits(left[path]) == _bits(right[path]) for path in left)


def _bits(leaf: Any) -> list[tuple[str, bytes]]:
    parts = [leaf] if not isinstance(leaf, QTensor) else [leaf.codes, leaf.scale, leaf.zero_point]
    if isinstance(leaf, QTensor):
        parts += [leaf.order, leaf.input_scale]
    return [(str(p.dtype), np.asarray(p).tobytes()) for p in parts if p is not None]
