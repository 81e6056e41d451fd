"""Blocks as chains of stages, scales folded into producers, quantized leaves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import blockwise, tree
from jq.models.decoder import NUM_STAGES
from jq.models.hf_names import weight_table
from jq.qtensor import from_codes
from jq.spec import QuantSpec
from tests.models.running import TOKENS, forward, relative_error
from tests.oracles.decoder import decoder_logits


@partial(jax.jit, static_argnums=(0, 1, 2))
def block_stage(model, kind, index, params, x, carry, mask):
    return model.block_stage(kind, index, params, x, carry, mask)


def run_stages(model, params, name, h, mask=None):
    x, carry, inputs = h, None, []
    for index in range(len(model.linear_groups) + 1):
        kind = model.block_kind(name)
        x, carry = block_stage(model, kind, index, params[name], x, carry, mask)
        inputs.append(x)
    assert carry is None
    return inputs


@pytest.mark.parametrize("name", ["llama-bias-gelu", "qwen3-layers"])
def test_stages_compose_to_the_model(load, name):
    model, params, _, _ = load(name)
    mask = np.ones(TOKENS.shape, bool)
    mask[0, 11:] = False
    h = model.embed(params, TOKENS)
    for block in model.block_names:
        *inputs, h = run_stages(model, params, block, h, mask)
        for group, x in zip(model.linear_groups, inputs, strict=True):
            for linear in group.linears:
                assert x.shape[-1] == tree.get(params[block], f"{linear}/kernel").shape[0]
    want = np.asarray(forward(model, params, TOKENS, mask=mask), np.float64)
    assert relative_error(model.logits(params, h), want) < 1e-5
    assert len(model.linear_groups) + 1 == NUM_STAGES


def test_stages_reject_an_index_beyond_the_last(load):
    model, params, _, _ = load("llama3")
    with pytest.raises(IndexError, match="stages 0 to 4, not 5"):
        model.block_stage(None, 5, params["layers_0"], model.embed(params, TOKENS), None, None)


def test_block_kinds_are_the_windows(load):
    model, _, _, _ = load("qwen3-layers")
    assert [model.block_kind(name) for name in model.block_names] == [3, None]
    assert isinstance(hash(model), int)
    _: blockwise.BlockwiseModel = model


def scale_producer(block, group, rng):
    """Fold 1/s into the producer's output channels and s into the rows of the group's kernels."""
    width = tree.get(block, f"{group.linears[0]}/kernel").shape[0]
    if group.share > 1:
        heads = width // (group.share * group.head_dim)
        small = np.exp(rng.uniform(-1, 1, (heads, group.head_dim))).astype(np.float32)
        s = np.repeat(small[:, None], group.share, axis=1).reshape(-1)
        small = small.reshape(-1)
    else:
        small = s = np.exp(rng.uniform(-1, 1, width)).astype(np.float32)
    names = ("scale",) if group.producer_kind == "norm" else ("kernel", "bias")
    for name in names:
        path = f"{group.producer}/{name}"
        if tree.has(block, path):
            old = tree.get(block, path)
            new = old / jnp.broadcast_to(small, old.shape)
            block = tree.replace(block, path, new)
    for linear in group.linears:
        old = tree.get(block, f"{linear}/kernel")
        new = old * jnp.broadcast_to(s[:, None], old.shape)
        block = tree.replace(block, f"{linear}/kernel", new)
    return block


@pytest.mark.parametrize("name", ["llama-bias-gelu", "qwen2", "qwen3-layers"])
@pytest.mark.parametrize("index", range(NUM_STAGES - 1))
def test_a_scale_folded_into_the_producer_cancels(load, name, index):
    model, params, _, _ = load(name)
    group = model.linear_groups[index]
    scaled = params | {
        "layers_1": scale_producer(params["layers_1"], group, np.random.default_rng(index))
    }
    before = np.asarray(forward(model, params, TOKENS), np.float64)
    after = forward(model, scaled, TOKENS)
    assert relative_error(after, before) < 2e-5
    kernels = [f"layers_1/{linear}/kernel" for linear in group.linears]
    assert all(not np.allclose(tree.get(params, k), tree.get(scaled, k)) for k in kernels)


def random_qtensor(rng, k, n):
    """An asymmetric int4 weight in groups of 8 with permuted rows, and its float64 value."""
    spec = QuantSpec("int4", 8, symmetric=False, scale_dtype="float32")
    codes = rng.integers(0, 16, (k, n), dtype=np.uint8)
    zero = rng.integers(6, 10, (k // 8, n)).astype(np.float32)
    scale = rng.uniform(0.02, 0.08, (k // 8, n)).astype(np.float32)
    order = rng.permutation(k).astype(np.int32)
    values = np.zeros((k, n))
    for stored, row in enumerate(order):
        group = stored // 8
        values[row] = (codes[stored] - zero[group].astype(np.float64)) * scale[group]
    codes, scale, zero = jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(zero)
    return from_codes(codes, scale, zero, spec, order=jnp.asarray(order)), values


def test_quantized_leaves_go_through_apply(load):
    model, params, raw, weights = load("llama3", layers=1)
    rng = np.random.default_rng(3)
    quantized, exact = dict(params), dict(weights)
    entries = [e for e in weight_table(model.config) if e.path.endswith("_proj/kernel")]
    for entry in entries:
        qtensor, values = random_qtensor(rng, *entry.shape)
        quantized = tree.replace(quantized, entry.path, qtensor)
        exact[entry.key] = values.T
    assert len(entries) == 7
    want = np.stack([decoder_logits(raw, exact, row) for row in TOKENS])
    assert relative_error(forward(model, quantized, TOKENS), want) < 2e-5
    h = model.embed(quantized, TOKENS)
    for block in model.block_names:
        *_, h = run_stages(model, quantized, block, h)
    assert relative_error(model.logits(quantized, h), want) < 2e-5


def test_a_quantized_head_goes_through_apply(load):
    model, params, raw, weights = load("llama3")
    head, values = random_qtensor(np.random.default_rng(4), 32, raw["vocab_size"])
    quantized = params | {"lm_head": {"kernel": head}}
    want = decoder_logits(raw, weights | {"lm_head.weight": values.T}, TOKENS[0])
    assert relative_error(forward(model, quantized, TOKENS[:1])[0], want) < 2e-5
