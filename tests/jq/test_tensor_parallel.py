"""A whole parameter tree cut over a mesh: where every array lies, and that the model computes what
it does on one device.

Meshes need eight devices, and run in a process of their own that has them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jq
from jq import tree
from jq.checkpoint import direct, read_manifest, reader, splits
from jq.checkpoint.format import ArrayEntry
from jq.cuts import Weight
from jq.errors import CheckpointError, ModelError, SpecError
from jq.methods.rtn import rtn_quantize
from jq.models import Decoder, generation
from jq.models.config import ModelConfig
from jq.models.generation import generate
from jq.models.sampling import Sampling
from jq.prepare import choices
from jq.qtensor import QTensor
from jq.sharded import ShardedTensor
from jq.spec import QuantSpec, w8a8
from jq.tensor_parallel import TensorParallel, tensor_mesh, unsharded
from tests.calib import hlo
from tests.checkpoint.trees import assert_same, cut_into_chunks
from tests.devices import EIGHT, on_eight, run_with
from tests.models import checkpoints

pytestmark = pytest.mark.usefixtures("fast_compiles")
# Eight devices cut every linear of it between groups of 8.
RAW = checkpoints.CONFIGS["llama3"] | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
INT4 = QuantSpec("int4", 8)
CHUNKS = {
    "layers_0/attention/q_proj/kernel/codes": (32, 8),
    "layers_0/attention/o_proj/kernel/codes": (4, 64),
    "embed/embedding": (8, 64),
    "lm_head/kernel": (64, 8),
}
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 6), dtype=np.int32)


@pytest.mark.skipif(EIGHT, reason="this is that process")
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(marked):
    run_with(8, __file__, marked)


def decoder(spec: QuantSpec | None = INT4, *, ordered: bool = False):
    """A decoder of one layer whose linears are rounded to nearest."""
    model = Decoder(ModelConfig.from_hf(RAW))
    params = model.init(jax.random.key(0), TOKENS)["params"]
    if spec is None:
        return model, params
    for path, leaf in tree.leaves(params):
        if path.startswith("layers_") and path.endswith("/kernel"):
            params = tree.replace(params, path, quantized(leaf, spec, ordered))
    return model, params


def quantized(kernel, spec, ordered=False) -> QTensor:
    order = jnp.arange(kernel.shape[0], dtype=jnp.int32)[::-1]
    rounded = rtn_quantize(kernel[order] if ordered else kernel, spec).to_qtensor(spec)
    return dataclasses.replace(rounded, order=order) if ordered else rounded


def meshes() -> dict[str, tuple[Mesh, str]]:
    grid = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    return {
        **{str(n): (tensor_mesh(n), "model") for n in (1, 2, 8)},
        "2x4": (grid, "model"),
        "4": (Mesh(np.array(jax.devices()[4:]), ("tp",)), "tp"),
    }


def shards(array) -> tuple[int, ...]:
    return array.addressable_shards[0].data.shape


@on_eight
@pytest.mark.parametrize("name", ["2", "2x4", "8"])
def test_logits_are_those_of_one_device(name):
    model, params = decoder()
    rule = TensorParallel(model, *meshes()[name])
    parts = rule.parts
    cut = rule.shard(params)
    layer = cut["layers_0"]
    assert shards(layer["attention"]["q_proj"]["kernel"].weight.codes) == (32, 64 // parts)
    assert shards(layer["mlp"]["down_proj"]["kernel"].weight.codes) == (64 // parts, 64)
    assert shards(layer["mlp"]["down_proj"]["kernel"].weight.scale) == (16 // parts, 64)
    assert shards(cut["embed"]["embedding"]) == (64 // parts, 64)
    assert shards(cut["lm_head"]["kernel"]) == (64, 64 // parts)
    assert shards(layer["input_norm"]["scale"]) == (64,)
    run = jax.jit(lambda p, t: model.apply({"params": p}, t))
    compiled = run.lower(cut, TOKENS).compile()
    logits = np.asarray(compiled(cut, TOKENS), np.float64)
    one = np.asarray(run(params, TOKENS), np.float64)
    assert np.abs(logits - one).max() < 1e-5 * np.abs(one).max()
    # Three sums of hidden states: of the embedding's rows, behind attention and behind the MLP.
    exchanged = hlo.collectives(compiled.as_text())
    assert exchanged.pop(("all-reduce", TOKENS.size * 64 * 4)) == 3
    # And nothing else: heads that the devices do not divide are everywhere.
    assert not exchanged
    whole = parts > model.config.num_key_value_heads
    key = layer["attention"]["k_proj"]["kernel"]
    assert shards(key.weight.codes) == (32, 16 if whole else 16 // parts)


@on_eight
@pytest.mark.parametrize("kind", ["act order", "8 bits", "plain", "zero"])
def test_other_weights(kind):
    spec = {
        "8 bits": w8a8(),
        "plain": None,
        "act order": INT4,
        "zero": QuantSpec("int3", 8, symmetric=False),
    }[kind]
    model, params = decoder(spec, ordered=kind == "act order")
    cut = TensorParallel(model, tensor_mesh(2)).shard(params)
    down = cut["layers_0"]["mlp"]["down_proj"]["kernel"]
    if kind == "plain":
        assert down.sharding.spec == P("model", None)
    else:
        # Rows that lie anywhere, and scales over all inputs, are not cut.
        rows = kind == "zero"
        assert (down.k, down.n) == (("model", None) if rows else (None, "model"))
    run = jax.jit(lambda p, t: model.apply({"params": p}, t))
    logits, one = (np.asarray(run(p, TOKENS), np.float64) for p in (cut, params))
    assert np.abs(logits - one).max() < 1e-4 * np.abs(one).max()


@on_eight
@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_text_is_that_of_one_device(devices):
    """Of a cache that is cut by its two heads, and of a whole one."""
    model, params = decoder()
    cut = TensorParallel(model, tensor_mesh(devices)).shard(params)
    prompts = [[1, 2, 3], [4, 5]]
    made = [generate(model, p, prompts, 6, eos_token_ids=()) for p in (params, cut)]
    assert made[0] == made[1]
    tokens, mask = generation._pad_left(prompts)
    token, cache = generation._prefill(model, Sampling(), 64, cut, tokens, mask, None)
    assert shards(cache.keys[0]) == (2, 64, 1 if devices == 2 else 2, 8)
    step = generation._step.lower(model, Sampling(), cut, token, cache, None, np.int32(1))
    exchanged = hlo.collectives(step.compile().as_text())
    assert exchanged.pop(("all-reduce", 2 * 64 * 4)) == 3
    # What is left is the choice among the parts of the vocabulary.
    assert all(size <= 2 * 4 * devices for _, size in exchanged)


@on_eight
def test_perplexity_is_that_of_one_device_and_a_reference_lies_on_the_same():
    model, params = decoder()
    two, four = (TensorParallel(model, tensor_mesh(n)).shard(params) for n in (2, 4))
    knobs = {"seq_len": 6, "batch_size": 2}
    one = jq.evaluate(model, params, TOKENS, **knobs)
    # What is tied to no device follows.
    many = jq.evaluate(model, two, TOKENS, reference_params=params, **knobs)
    assert many.window_nll == pytest.approx(one.window_nll, rel=1e-5)
    assert many.reference_window_nll == pytest.approx(one.window_nll, rel=1e-5)
    said = r"on devices \[0, 1\], the reference on \[0, 1, 2, 3\]; load both with one mesh"
    with pytest.raises(ModelError, match=said):
        jq.evaluate(model, two, TOKENS, reference_params=four, **knobs)


@on_eight
def test_checkpoints_go_from_mesh_to_mesh(tmp_path):
    model, params = decoder()
    jq.save(tmp_path / "whole", model, params)
    source = "whole"
    for name, (mesh, axis) in meshes().items():
        loaded, cut = jq.load(tmp_path / source, mesh=mesh, axis=axis)
        assert loaded == model
        assert_same(unsharded(cut), params)
        kernel = cut["layers_0"]["attention"]["o_proj"]["kernel"]
        assert isinstance(kernel, ShardedTensor)
        assert shards(kernel.weight.codes) == (32 // mesh.shape[axis], 64)
        jq.save(tmp_path / name, loaded, cut)
        source = name
    files = [
        {
            str(f.relative_to(tmp_path / n)): f.read_bytes()
            for f in (tmp_path / n).rglob("*")
            if f.is_file()
        }
        for n in ("whole", source)
    ]
    assert files[0] == files[1]
    # As eight processes write them: each device is given its own chunks.
    for path, chunk in CHUNKS.items():
        cut_into_chunks(tmp_path / "whole", path, chunk)
    for mesh, axis in meshes().values():
        assert_same(unsharded(jq.load(tmp_path / "whole", mesh=mesh, axis=axis)[1]), params)
    with pytest.raises(SpecError, match="give one of them"):
        jq.load(tmp_path / "whole", mesh=tensor_mesh(2), shardings=lambda path, shape: None)


@on_eight
@pytest.mark.parametrize("kind", ["int4", "act order", "8 bits", "zero", "plain"])
def test_what_one_process_wrote_goes_straight_to_its_devices(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "MIN_BYTES", 1)
    on_host = set()
    place = reader.place_array
    monkeypatch.setattr(
        reader, "place_array", lambda path, *a: on_host.add(path) or place(path, *a)
    )
    model, params = decoder(
        {"8 bits": w8a8(), "zero": QuantSpec("int8", 8, False), "plain": None}.get(kind, INT4),
        ordered=kind == "act order",
    )
    jq.save(tmp_path / "q", model, params)
    entries = dict(e for p in read_manifest(tmp_path / "q").parts.values() for e in p.arrays())
    pieces = {path for path, entry in entries.items() if entry.split is not None}
    field = {"plain": "", "zero": "/zero_point"}.get(kind, "/codes")
    for name in ("attention/q_proj", "attention/o_proj", "mlp/down_proj"):
        assert f"layers_0/{name}/kernel{field}" in pieces
    assert {"embed/embedding", "lm_head/kernel"} <= pieces
    for mesh, axis in (v for name, v in meshes().items() if name == "2x4" or kind == "int4"):
        on_host.clear()
        _, cut = jq.load(tmp_path / "q", mesh=mesh, axis=axis)
        assert_same(unsharded(cut), params)
        # One device takes all as it would without a mesh, every one keys and values of two heads
        # that so many do not divide.
        heads = {path for path in pieces if "/k_proj/" in path or "/v_proj/" in path}
        whole = {1: pieces, 2: set()}.get(mesh.shape[axis], heads)
        assert pieces & on_host == whole


@on_eight
def test_a_flipped_bit_of_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "MIN_BYTES", 1)
    jq.save(tmp_path / "q", *decoder())
    path = "layers_0/attention/o_proj/kernel/codes"
    file = tmp_path / "q/params/layers_0/state" / path.replace("/", ".") / "7.0.0"
    data = bytearray(file.read_bytes())
    data[1] ^= 64
    file.write_bytes(data)
    for devices in (1, 2):
        with pytest.raises(CheckpointError, match=f"^{path}: sha256 of the stored data is"):
            jq.load(tmp_path / "q", mesh=tensor_mesh(devices))


@on_eight
def test_which_shards_are_made_of_pieces():
    entry = ArrayEntry("int8", (48, 16), "", (6, 16), ("",) * 8, split=0)
    for devices, whole in [(1, False), (2, True), (3, False), (4, True), (6, False), (8, True)]:
        rows = NamedSharding(tensor_mesh(devices), P("model"))
        found = direct.direct_sharding("w", entry, rows)
        assert found == (rows if whole else None), devices
    mesh = tensor_mesh(2)
    for other in (P(None, "model"), P()):
        assert direct.direct_sharding("w", entry, NamedSharding(mesh, other)) is None
    elsewhere = NamedSharding(mesh, P("model"), memory_kind="pinned_host")
    assert direct.direct_sharding("w", entry, elsewhere) is None
    stored = direct.stored_sharding(entry, NamedSharding(mesh, P("model")))
    assert stored.shard_shape(entry.stored_shape) == (4, 6, 16)


@on_eight
def test_pieces_become_one_where_they_lie():
    lie = NamedSharding(tensor_mesh(8, "own"), P(None, "own"))
    x = jax.device_put(np.arange(4 * 16 * 6, dtype=np.float32).reshape(4, 16, 6), lie)
    program = direct._joiner(lie, 1).lower(x).compile()
    assert hlo.collectives(program.as_text()) == {}
    # In the memory that it had: devices need no room for a second copy.
    assert program.memory_analysis().alias_size_in_bytes == x.nbytes // 8
    np.testing.assert_array_equal(program(x), np.arange(384.0).reshape(4, 96))


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("model",))


@on_eight
def test_what_cannot_be_cut_is_refused_with_the_sizes_that_can(tmp_path):
    model, params = decoder(QuantSpec("int4", 32))
    said = (
        "1 quantized weights cannot be cut over 4 devices: layers_0/attention/o_proj/kernel: "
        "4 shards of K = 64 are not multiples of 32. All can over 1, 2"
    )
    with pytest.raises(SpecError, match=f"^{said}$"):
        TensorParallel(model, tensor_mesh(4)).shard(params)
    jq.save(tmp_path / "m", model, params)
    with pytest.raises(SpecError, match="cannot be cut over 8 devices"):
        jq.load(tmp_path / "m", mesh=tensor_mesh(8))


def test_the_rule():
    model = Decoder(ModelConfig.from_hf(RAW))
    rule = TensorParallel(model, one_device())
    plain, ordered = Weight(INT4, 64, 64, False), Weight(INT4, 64, 64, True)
    for name in ("attention/q_proj", "attention/v_proj", "mlp/gate_proj", "mlp/up_proj"):
        assert rule.cut(f"layers_0/{name}/kernel", 64, plain) == (None, "model")
    for name in ("attention/o_proj", "mlp/down_proj"):
        path = f"layers_0/{name}/kernel"
        assert rule.cut(path, 64, plain) == rule.cut(path, 64) == ("model", None)
        assert rule.cut(path, 64, ordered) == (None, "model")
        assert rule.cut(path, 64, Weight(w8a8(), 64, 64, False)) == (None, "model")
    assert rule.cut("lm_head/kernel", 64) == (None, "model")
    # Heads of 8 channels stay together.
    for parts, axis in ((2, "model"), (4, None), (3, None)):
        assert rule.cut("layers_0/attention/k_proj/kernel", 16, parts=parts) == (None, axis)
    assert rule.cut("layers_0/attention/q_proj/kernel", 64, parts=8) == (None, "model")
    assert rule.cut("layers_0/mlp/up_proj/kernel", 16, parts=16) == (None, "model")
    assert rule.parts == 1
    with pytest.raises(SpecError, match="has axes model, and none 'tp'"):
        TensorParallel(model, one_device(), "tp")
    count = len(jax.local_devices())
    with pytest.raises(SpecError, match=f"{count + 1} devices are asked for"):
        tensor_mesh(count + 1)


def test_a_sharded_tensor_tells_what_its_weight_is():
    w = quantized(jnp.ones((16, 8)), INT4)
    cut = ShardedTensor(w, one_device(), None, "model")
    assert (cut.shape, cut.ndim, cut.nbytes, cut.spec) == ((16, 8), 2, w.nbytes, INT4)
    assert unsharded({"a": cut, "b": 1}) == {"a": w, "b": 1}
    assert list(choices({"up": {"kernel": cut}}, "sm_90")) == ["up/kernel"]
    again = jax.tree.map(lambda a: a, cut)
    assert (again.k, again.n, again.mesh) == (None, "model", cut.mesh)
