"""The decoder against the float64 oracle, and against itself in other ways of running."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import blockwise, tree
from jq.models import attention
from jq.models.cache import init_cache
from jq.models.decoder import NUM_STAGES, Decoder
from jq.models.hf_names import weight_table
from jq.models.hf_weights import HFCheckpoint
from jq.qtensor import from_codes
from jq.spec import QuantSpec
from tests.models import checkpoints
from tests.oracles.decoder import decoder_logits

TOKENS = np.random.default_rng(1).integers(0, 64, (2, 14), dtype=np.int32)

# Configs that between them have all code paths of a block.
VARIED = ["llama3", "llama-bias-gelu", "mistral-window", "qwen2", "qwen3-layers"]


def relative_error(got, want):
    """Largest difference over the reference's standard deviation."""
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / np.std(want)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """name -> (model, params, raw config, checkpoint weights), each made once."""
    made = {}

    def load(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            weights = checkpoints.write(folder, checkpoints.CONFIGS[name])
            checkpoint = HFCheckpoint(folder)
            model = Decoder(checkpoint.config)
            made[name] = model, checkpoint.load(), checkpoints.CONFIGS[name], weights
        return made[name]

    return load


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, **options):
    return model.apply({"params": params}, tokens, **options)


@partial(jax.jit, static_argnums=(0, 1, 2))
def block_stage(model, kind, index, params, x, carry, mask):
    return model.block_stage(kind, index, params, x, carry, mask)


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_logits_agree_with_the_oracle(load, name):
    model, params, raw, weights = load(name)
    logits = forward(model, params, TOKENS)
    assert logits.dtype == jnp.float32
    want = np.stack([decoder_logits(raw, weights, row) for row in TOKENS])
    assert relative_error(logits, want) < 2e-5


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(load, name, side):
    model, params, raw, weights = load(name)
    lengths = [9, 14]
    tokens, mask = np.full((2, 16), 7, np.int32), np.zeros((2, 16), bool)
    for row, length in enumerate(lengths):
        at = slice(16 - length, 16) if side == "left" else slice(0, length)
        tokens[row, at], mask[row, at] = TOKENS[row, :length], True
    logits = np.asarray(forward(model, params, tokens, mask=mask))
    for row, length in enumerate(lengths):
        want = decoder_logits(raw, weights, TOKENS[row, :length])
        assert relative_error(logits[row][mask[row]], want) < 2e-5
    assert np.isfinite(logits).all()


def test_a_row_of_padding_only_is_finite(load):
    model, params, _, _ = load("llama3")
    mask = np.ones((2, 14), bool)
    mask[1] = False
    assert np.isfinite(forward(model, params, TOKENS, mask=mask)).all()


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_is_the_full_forward(load, name, side):
    model, params, raw, weights = load(name)
    prefill = {"left": 5, "right": 6}[side]
    lengths = [3, 5]
    tokens, mask = np.zeros((2, prefill), np.int32), np.zeros((2, prefill), bool)
    for row, length in enumerate(lengths):
        at = slice(prefill - length, prefill) if side == "left" else slice(0, length)
        tokens[row, at], mask[row, at] = TOKENS[row, :length], True
    cache = init_cache(model.config, 2, 20)
    at = np.array([np.flatnonzero(m)[-1] for m in mask], np.int32)
    logits, cache = forward(model, params, tokens, mask=mask, cache=cache, at=at)
    got = [logits]
    for step in range(6):
        token = np.stack([TOKENS[row, n + step : n + step + 1] for row, n in enumerate(lengths)])
        logits, cache = forward(model, params, token, cache=cache)
        got.append(logits)
    got = np.concatenate(got, axis=1)
    for row, length in enumerate(lengths):
        want = decoder_logits(raw, weights, TOKENS[row, : length + 6])[length - 1 :]
        assert relative_error(got[row], want) < 2e-5
    assert int(cache.length) == prefill + 6


def test_explicit_positions_are_used(load):
    model, params, _, _ = load("llama3")
    base = np.broadcast_to(np.arange(14, dtype=np.int32), TOKENS.shape)
    plain = np.asarray(forward(model, params, TOKENS), np.float64)
    shifted = forward(model, params, TOKENS, positions=base + 3)
    stretched = forward(model, params, TOKENS, positions=base * 2)
    assert relative_error(shifted, plain) < 1e-4  # rotary embeddings are relative
    assert relative_error(stretched, plain) > 1e-2


@pytest.mark.parametrize("window", [None, 3])
def test_long_queries_are_chunked_to_the_same_result(monkeypatch, load, window):
    model, params, _, _ = load("mistral-window" if window else "llama3")
    whole = forward(model, params, TOKENS)
    monkeypatch.setattr(attention, "MAX_UNCHUNKED", 6)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)  # 14 tokens: a part-filled last chunk
    chunked = forward(model, params, TOKENS)
    assert relative_error(chunked, np.asarray(whole, np.float64)) < 1e-5


def test_bfloat16_parameters_and_activations(load):
    model, params, raw, weights = load("llama3")
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = {k: v.astype(jnp.bfloat16) for k, v in weights.items()}
    want = decoder_logits(raw, exact, TOKENS[0])
    # bf16 weights in float32 arithmetic lose nothing; bf16 activations lose 8 bits of mantissa.
    assert relative_error(forward(model, small, TOKENS[:1])[0], want) < 2e-5
    half = Decoder(model.config, dtype=jnp.bfloat16)
    logits = forward(half, small, TOKENS[:1])
    assert logits.dtype == jnp.float32
    error = np.asarray(logits[0], np.float64) - want
    assert 1e-4 < np.std(error) / np.std(want) < 0.05


@pytest.mark.parametrize("name", VARIED)
def test_init_makes_the_tree_that_checkpoints_have(load, name):
    model, params, _, _ = load(name)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    shapes = {path: leaf.shape for path, leaf in tree.leaves(made["params"])}
    assert shapes == {path: leaf.shape for path, leaf in tree.leaves(params)}
    half = Decoder(model.config, param_dtype=jnp.bfloat16)
    made = jax.eval_shape(lambda: half.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert {leaf.dtype for _, leaf in tree.leaves(made["params"])} == {jnp.dtype(jnp.bfloat16)}


def run_stages(model, params, name, h, mask=None):
    x, carry, inputs = h, None, []
    for index in range(len(model.linear_groups) + 1):
        kind = model.block_kind(name)
        x, carry = block_stage(model, kind, index, params[name], x, carry, mask)
        inputs.append(x)
    assert carry is None
    return inputs


@pytest.mark.parametrize("name", VARIED)
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


@pytest.mark.parametrize("name", VARIED)
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
    arrays = (jnp.asarray(a) for a in (codes, scale, zero))
    return from_codes(*arrays, spec, order=jnp.asarray(order)), values


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_quantized_leaves_go_through_apply(load, name):
    model, params, raw, weights = load(name)
    rng = np.random.default_rng(3)
    quantized, exact = dict(params), dict(weights)
    entries = [e for e in weight_table(model.config) if e.path.endswith("_proj/kernel")]
    for entry in entries:
        qtensor, values = random_qtensor(rng, *entry.shape)
        quantized = tree.replace(quantized, entry.path, qtensor)
        exact[entry.key] = values.T
    assert len(entries) == 7 * 2
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
