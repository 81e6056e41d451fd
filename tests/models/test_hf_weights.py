"""Model folders: what loads, and everything that is refused."""

import json
import pickle

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jq import tree
from jq.errors import CheckpointError, ModelError, OutputError
from jq.models.config import ModelConfig
from jq.models.hf_names import weight_table
from jq.models.hf_weights import HFCheckpoint, save_hf
from jq.models.safetensors_file import SafetensorsFile, write_safetensors
from jq.qtensor import QTensor
from jq.spec import QuantSpec
from tests.models import checkpoints

RAW = checkpoints.CONFIGS["qwen3"]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def weights():
    return checkpoints.random_weights(RAW)


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in tree.leaves(params)}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], strict=True)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_every_tensor_finds_its_place(tmp_path, weights):
    checkpoints.write(tmp_path, RAW, weights)
    params = flat(HFCheckpoint(tmp_path).load())
    q = weights["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(params["layers_1/attention/q_proj/kernel"], q.T)
    embedding = weights["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed/embedding"], embedding)
    assert len(params) == len(weights)
    shapes = {entry.key: entry.stored_shape for entry in weight_table(ModelConfig.from_hf(RAW))}
    assert shapes == checkpoints.shapes(RAW)


def test_shards_and_single_blocks_give_the_same(tmp_path, weights):
    checkpoints.write(tmp_path / "one", RAW, weights)
    checkpoints.write_sharded(tmp_path / "many", RAW, weights)
    whole = HFCheckpoint(tmp_path / "one").load()
    checkpoint = HFCheckpoint(tmp_path / "many")
    assert len(checkpoint.files) == 3
    assert checkpoint.block_names == ("layers_0", "layers_1")
    parts = {name: checkpoint.block(name) for name in checkpoint.block_names}
    assert_same(flat(checkpoint.outer() | parts), flat(whole))
    with pytest.raises(ModelError, match="no block 'layers_2'; blocks are layers_0 to layers_1"):
        checkpoint.block("layers_2")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_dtypes_are_kept_unless_another_is_wanted(tmp_path, weights, dtype):
    small = {key: value.astype(dtype) for key, value in weights.items()}
    write_safetensors(tmp_path / "model.safetensors", small)
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    kept = flat(HFCheckpoint(tmp_path).load())
    assert {leaf.dtype for leaf in kept.values()} == {np.dtype(dtype)}
    exact = small["lm_head.weight"].astype(np.float32)
    converted = HFCheckpoint(tmp_path, dtype=jnp.float32).outer()["lm_head"]["kernel"]
    np.testing.assert_array_equal(converted, exact.T, strict=True)


def test_arrays_go_where_place_puts_them(tmp_path, weights):
    checkpoints.write(tmp_path, RAW, weights)
    seen = {}

    def place(path, array):
        seen[path] = array.shape
        return jnp.zeros(array.shape)

    params = HFCheckpoint(tmp_path, place=place).block("layers_1")
    assert seen["layers_1/mlp/down_proj/kernel"] == (48, 32)
    assert {leaf.shape for _, leaf in tree.leaves(params)} == set(seen.values())


def test_loaded_arrays_do_not_depend_on_the_file(tmp_path, weights):
    checkpoints.write(tmp_path, RAW, weights)
    params = HFCheckpoint(tmp_path).load()
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(-4096, 2)
        handle.write(bytes(4096))
    want = {entry.path: weights[entry.key] for entry in weight_table(ModelConfig.from_hf(RAW))}
    for path, value in flat(params).items():
        assert np.array_equal(value, want[path].T if path.endswith("kernel") else want[path])


def test_all_mapping_failures_are_told_at_once(tmp_path, weights):
    broken = dict(weights)
    del broken["model.norm.weight"]
    del broken["model.layers.1.mlp.up_proj.weight"]
    broken["model.layers.0.extra.weight"] = np.zeros(3, np.float32)
    broken["model.layers.0.mlp.gate_proj.weight"] = np.zeros((47, 32), np.float32)
    broken["lm_head.weight"] = np.zeros((64, 32), np.int8)
    checkpoints.write(tmp_path, RAW, broken)
    with pytest.raises(ModelError) as caught:
        HFCheckpoint(tmp_path)
    text = str(caught.value)
    assert "missing (2): model.layers.1.mlp.up_proj.weight, model.norm.weight" in text
    assert "unexpected (1): model.layers.0.extra.weight" in text
    assert "gate_proj.weight: expected shape (48, 32), found (47, 32)" in text
    assert "not floating point (1): lm_head.weight" in text


def test_long_listings_are_cut(tmp_path, weights):
    extra = {f"x{i}": np.zeros(1, np.float32) for i in range(30)}
    checkpoints.write(tmp_path, RAW, weights | extra)
    with pytest.raises(ModelError, match=r"unexpected \(30\): .*and 10 more"):
        HFCheckpoint(tmp_path)


def test_known_leftovers_are_no_failure(tmp_path):
    raw = checkpoints.CONFIGS["llama3-tied-v5"]
    weights = checkpoints.random_weights(raw)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    checkpoints.write(tmp_path, raw, weights | buffers | tied)
    assert "lm_head" not in HFCheckpoint(tmp_path).load()


def test_folders_that_are_no_model(tmp_path, weights):
    with pytest.raises(ModelError, match="is not a folder"):
        HFCheckpoint(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        HFCheckpoint(tmp_path)
    quantized = RAW | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ModelError, match=r"already quantized \(quant_method 'gptq'\)"):
        HFCheckpoint(tmp_path)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(Canary(str(canary))))
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    with pytest.raises(ModelError, match=f"pickled weights only .{name}"):
        HFCheckpoint(tmp_path)
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        HFCheckpoint(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/{}", "..\\{}", "model.bin"])
def test_indexes_that_leave_the_folder_are_refused(tmp_path, weights, name):
    index = checkpoints.write_sharded(tmp_path / "model", RAW, weights)
    real = index["weight_map"]["model.norm.weight"]
    save_file({"model.norm.weight": weights["model.norm.weight"]}, tmp_path / real)
    edit_index(tmp_path / "model", lambda m: m.update({"model.norm.weight": name.format(real)}))
    with pytest.raises(ModelError, match=r"must be plain \.safetensors names"):
        HFCheckpoint(tmp_path / "model")


def test_links_that_leave_the_folder_are_refused_but_for_the_hub_cache(tmp_path, weights):
    model = tmp_path / "hub" / "snapshots" / "abc"
    checkpoints.write(model, RAW, weights)
    file = model / "model.safetensors"
    (tmp_path / "hub" / "blobs").mkdir()
    blob = file.rename(tmp_path / "hub" / "blobs" / "digest")
    file.symlink_to(blob)
    assert HFCheckpoint(model).config.num_hidden_layers == 2
    elsewhere = blob.rename(tmp_path / "elsewhere")
    file.unlink()
    file.symlink_to(elsewhere)
    with pytest.raises(ModelError, match=r"is a link to .*elsewhere, outside the model's folder"):
        HFCheckpoint(model)


def test_missing_and_contradictory_shards_are_refused(tmp_path, weights):
    index = checkpoints.write_sharded(tmp_path, RAW, weights)
    first, second, _ = sorted(set(index["weight_map"].values()))
    saved = (tmp_path / second).read_bytes()
    (tmp_path / second).unlink()
    with pytest.raises(ModelError, match=f"names '{second}', which is missing"):
        HFCheckpoint(tmp_path)
    (tmp_path / second).write_bytes((tmp_path / first).read_bytes())
    with pytest.raises(ModelError, match=f"is in both .*{first} and .*{second}"):
        HFCheckpoint(tmp_path)
    (tmp_path / second).write_bytes(saved)
    key = next(k for k, v in index["weight_map"].items() if v == second)
    edit_index(tmp_path, lambda m: m.update({key: first}))
    with pytest.raises(ModelError, match=f"places {key} in {first}, but it is in {second}"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "must map tensor names to file names"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "duplicate key 'a'"),
    ],
)
def test_damaged_indexes_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["llama-bias-gelu", "qwen2", "qwen3-yarn-v5"])
def test_saving_and_loading_is_the_identity(tmp_path, load, name):
    model, params, _, weights = load(name)
    params = tree.replace(
        params, "final_norm/scale", params["final_norm"]["scale"].astype("bfloat16")
    )
    save_hf(params, model.config, tmp_path / "model")
    back = HFCheckpoint(tmp_path / "model")
    assert back.config == model.config
    assert_same(flat(back.load()), flat(params))
    assert set(SafetensorsFile(tmp_path / "model" / "model.safetensors").tensors) == set(weights)


def test_saving_refuses_what_it_cannot_say(tmp_path, load):
    model, params, _, _ = load("qwen2")
    save_hf(params, model.config, tmp_path)
    with pytest.raises(OutputError, match=r"holds config\.json, model\.safetensors already"):
        save_hf(params, model.config, tmp_path)
    save_hf(params, model.config, tmp_path, overwrite=True)
    without = {key: value for key, value in params.items() if key != "final_norm"}
    with pytest.raises(ModelError, match=r"missing \(1\): final_norm/scale"):
        save_hf(without, model.config, tmp_path / "new")
    one = jnp.ones((1, 1))
    packed = QTensor(one, one, None, None, None, QuantSpec(), 32, 32)
    quantized = tree.replace(params, "layers_0/attention/q_proj/kernel", packed)
    with pytest.raises(ModelError, match=r"plain arrays only.*layers_0/attention/q_proj/kernel"):
        save_hf(quantized, model.config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
