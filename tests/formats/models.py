"""Small models whose linears are QTensors of random codes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import tree
from jq.formats.arrays import float_qtensor, make_qtensor, pack_codes
from jq.models import HFCheckpoint
from jq.models.safetensors_file import write_safetensors
from jq.qtensor import QTensor
from jq.spec import QuantSpec
from tests.models import checkpoints

# Tied embeddings and biases; every linear has multiples of 16 inputs and of 8 outputs.
RAW = checkpoints.CONFIGS["qwen2"]
SMALL = {"tokenizer.json": b"{}", "generation_config.json": b'{"eos_token_id": 3}\n'}

W4 = QuantSpec("int4", 16, False, scale_dtype="float16")
W4_SYM = dataclasses.replace(W4, symmetric=True)


def write_source(folder, raw=RAW):
    """A bfloat16 model folder with tokenizer and generation files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = checkpoints.random_weights(raw)
    halves = {name: w.astype(ml_dtypes.bfloat16) for name, w in weights.items()}
    (folder / "config.json").write_text(json.dumps(raw))
    write_safetensors(folder / "model.safetensors", halves)
    for name, data in SMALL.items():
        (folder / name).write_bytes(data)
    return folder


def quantized(folder, spec_of, ordered=False, seed=0):
    """The folder's parameters, with QTensors of random codes where `spec_of(path)` is no None."""
    rng = np.random.default_rng(seed)
    params = HFCheckpoint(folder, place=on_host).load()
    for path, leaf in tree.leaves(params):
        spec = spec_of(path) if "layers_" in path and path.endswith("/kernel") else None
        if spec is not None:
            params = tree.replace(params, path, random_qtensor(rng, *leaf.shape, spec, ordered))
    return params


def random_qtensor(rng, k, n, spec, ordered=False) -> QTensor:
    """NumPy leaves, so that nothing is compiled."""
    shape = spec.scale_shape(k, n)
    scale = (0.01 + rng.random(shape)).astype(jnp.dtype(spec.scale_dtype))
    static = spec.activation is not None and spec.activation.static
    input_scale = np.asarray(0.37, np.float32) if static else None
    if spec.is_float:
        codes = rng.standard_normal((k, n)).astype(ml_dtypes.float8_e4m3fn)
        return float_qtensor(codes, scale, spec, input_scale)
    codes = rng.integers(0, 2**spec.bits, (k, n)).astype(np.uint8)
    zeros = None if spec.symmetric else rng.integers(0, 2**spec.bits, shape).astype(np.uint8)
    order = rng.permutation(k).astype(np.int32) if ordered else None
    packed = pack_codes(codes, spec.bits)
    return make_qtensor(packed, scale, zeros, spec, (k, n), order, input_scale)


def on_host(path, array):
    """A `place` that leaves arrays where they are."""
    return np.array(array)


def assert_same(found, wanted):
    """Every array bit for bit; scales may have another dtype of the same values."""
    found, wanted = dict(tree.leaves(found)), dict(tree.leaves(wanted))
    assert found.keys() == wanted.keys()
    for path, want in wanted.items():
        got = found[path]
        assert isinstance(got, QTensor) == isinstance(want, QTensor), path
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=path, strict=True)
        if isinstance(want, QTensor):
            assert (got.spec, got.shape) == (want.spec, want.shape), path
