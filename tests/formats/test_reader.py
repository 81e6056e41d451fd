"""Folders of other tools: what loads, and how it runs."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import jq
from jq import tree
from jq.errors import ModelError
from jq.formats.reader import QuantizedCheckpoint, is_quantized_folder
from jq.models.hf_weights import HFCheckpoint
from jq.qtensor import QTensor
from tests.formats import folders
from tests.formats.folders import activations, awq_config, ct_config, gptq_config, group
from tests.models import checkpoints
from tests.models.running import forward, relative_error

TOKENS = np.random.default_rng(2).integers(0, 64, (2, 9), dtype=np.int32)
INT8 = group("int-quantized", activations("int"), num_bits=8, strategy="channel", group_size=None)
FLOAT8 = group("float-quantized", None, num_bits=8, type="float", strategy="channel")

CASES = {
    "gptq": (gptq_config(), folders.gptq_linear),
    "gptq-v2-int8-symmetric": (
        gptq_config(bits=8, sym=True, desc_act=False, checkpoint_format="gptq_v2"),
        functools.partial(folders.gptq_linear, bits=8, sym=True, desc_act=False, version=2),
    ),
    "gptq-int3": (gptq_config(bits=3), functools.partial(folders.gptq_linear, bits=3)),
    "awq": (awq_config(), folders.awq_linear),
    "packed": (ct_config(group()), folders.packed_linear),
    "packed-act-order": (
        ct_config(group(symmetric=False, actorder="group")),
        functools.partial(folders.packed_linear, symmetric=False, act_order=True),
    ),
    "naive-int8": (
        ct_config(group("naive-quantized", num_bits=8, strategy="channel")),
        folders.int8_linear,
    ),
    "float8": (ct_config(FLOAT8), folders.float8_linear),
}


def quantized(params):
    return {path: leaf for path, leaf in tree.leaves(params) if isinstance(leaf, QTensor)}


def assert_equal_models(folder, plain, count=14, run=False):
    """Same weights, to the last bit, and, where it is to run, the same logits."""
    model, params = jq.load(folder)
    model_plain, params_plain = jq.load(plain)
    assert len(quantized(params)) == count
    assert model == model_plain
    wanted = dict(tree.leaves(params_plain))
    for path, leaf in tree.leaves(params):
        assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(leaf))
        got = leaf.dequantize() if isinstance(leaf, QTensor) else leaf
        np.testing.assert_array_equal(got, wanted[path], strict=True)
    if run:
        want = np.asarray(forward(model, params_plain, TOKENS), np.float64)
        assert relative_error(forward(model, params, TOKENS), want) < 1e-5
    return params


@pytest.mark.parametrize("name", CASES)
def test_every_format_is_the_model_of_its_weights(tmp_path, name):
    folder, plain, stored = folders.write(tmp_path, *CASES[name])
    assert_equal_models(folder, plain, run=name in ("gptq", "float8", "packed-act-order"))
    assert is_quantized_folder(folder)
    assert not is_quantized_folder(plain)
    told = QuantizedCheckpoint(folder).stored()
    assert sum(tensor.scheme is not None for tensor in told) == 14
    assert sum(tensor.nbytes for tensor in told) == sum(array.nbytes for array in stored.values())


def test_eight_bit_activations_are_quantized_as_told(tmp_path):
    folder, plain, _ = folders.write(tmp_path, ct_config(INT8), folders.int8_linear)
    model, params = jq.load(folder)
    for w in quantized(params).values():
        assert w.spec.activation == jq.ActivationSpec("int8")
        assert w.codes.dtype == jnp.int8
    want = np.asarray(forward(model, jq.load(plain)[1], TOKENS), np.float64)
    error = relative_error(forward(model, params, TOKENS), want)
    assert 1e-4 < error < 0.5


def test_mixed_gptq_models(tmp_path):
    config = gptq_config(
        dynamic={r"-:.*layers\.0\.self_attn": {}, r".*down_proj": {"bits": 8, "group_size": 8}}
    )

    def linear(k, n, seed):
        down = (k, n) == (folders.RAW["intermediate_size"], folders.RAW["hidden_size"])
        return folders.gptq_linear(k, n, seed, *((8, 8) if down else (4, 16)))

    folder, plain, _ = folders.write(tmp_path, config, linear, skip=("layers.0.self_attn",))
    params = assert_equal_models(folder, plain, count=10)
    assert params["layers_1"]["mlp"]["down_proj"]["kernel"].spec.dtype == "int8"
    assert params["layers_1"]["mlp"]["up_proj"]["kernel"].spec.dtype == "int4"


def test_mixed_awq_models(tmp_path):
    config = awq_config(modules_to_not_convert=["layers.1.mlp", "v_proj"])
    folder, plain, _ = folders.write(
        tmp_path, config, folders.awq_linear, skip=("layers.1.mlp", "v_proj")
    )
    assert_equal_models(folder, plain, count=9)


def test_mixed_compressed_tensors_models(tmp_path):
    config = ct_config(
        group(targets=["re:.*self_attn.*"]),
        group("naive-quantized", num_bits=8, strategy="channel", targets=["re:.*down_proj"]),
        ignore=["lm_head", "re:.*layers.0.self_attn.o_proj"],
        format="mixed-precision",
    )

    def linear(k, n, seed):
        down = k == folders.RAW["intermediate_size"]
        return (folders.int8_linear if down else folders.packed_linear)(k, n, seed)

    skip = ("gate_proj", "up_proj", "layers.0.self_attn.o_proj")
    folder, plain, _ = folders.write(tmp_path, config, linear, skip=skip)
    assert_equal_models(folder, plain, count=9)


def test_biases_and_tied_embeddings(tmp_path):
    raw = checkpoints.CONFIGS["qwen2"]
    folder, plain, _ = folders.write(tmp_path, gptq_config(), folders.gptq_linear, raw=raw)
    params = assert_equal_models(folder, plain)
    assert "lm_head" not in params
    assert "bias" in params["layers_0"]["attention"]["q_proj"]


def test_biases_of_zeros_are_what_older_tools_write_for_none(tmp_path):
    folder, plain, stored = folders.write(tmp_path, gptq_config(), folders.gptq_linear)
    biases = {
        key.replace("qweight", "bias"): np.zeros(array.shape[1], np.float16)
        for key, array in stored.items()
        if key.endswith("qweight")
    }
    raw = json.loads((folder / "config.json").read_text())
    folders.write_tensors(folder, raw, stored | biases)
    assert_equal_models(folder, plain)
    biases["model.layers.0.mlp.up_proj.bias"][3] = 1
    folders.write_tensors(folder, raw, stored | biases)
    with pytest.raises(ModelError, match=r"unexpected \(1\): model.layers.0.mlp.up_proj.bias"):
        jq.load(folder)


def test_a_quantized_head(tmp_path):
    folder, plain, stored = folders.write(tmp_path, gptq_config(), folders.gptq_linear)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["lm_head"] = True
    tensors, weight = folders.gptq_linear(32, 64, 99)
    del stored["lm_head.weight"]
    folders.write_tensors(
        folder, raw, stored | {f"lm_head.{name}": array for name, array in tensors.items()}
    )
    weights = dict(HFCheckpoint(plain).load())
    want = weight.astype(np.float32)
    model, params = jq.load(folder)
    np.testing.assert_array_equal(params["lm_head"]["kernel"].dequantize(), want)
    logits = forward(model, weights | {"lm_head": {"kernel": jnp.asarray(want)}}, TOKENS)
    assert relative_error(forward(model, params, TOKENS), np.asarray(logits, np.float64)) < 1e-5


def test_shards_are_read_like_one_file(tmp_path):
    folder, plain, _ = folders.write(tmp_path, gptq_config(), folders.gptq_linear, shards=3)
    assert_equal_models(folder, plain)
    assert len(QuantizedCheckpoint(folder).files) == 3


def test_a_config_in_a_file_of_its_own(tmp_path):
    folder, plain, _ = folders.write(tmp_path, gptq_config(), folders.gptq_linear)
    raw = json.loads((folder / "config.json").read_text())
    told = raw.pop("quantization_config")
    del told["quant_method"]
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "quantize_config.json").write_text(json.dumps(told))
    assert_equal_models(folder, plain)


def test_scales_keep_their_dtype(tmp_path):
    def linear(k, n, seed):
        tensors, weight = folders.gptq_linear(k, n, seed)
        return tensors | {"scales": tensors["scales"].astype(np.float32)}, weight

    folder, _, _ = folders.write(tmp_path, gptq_config(), linear)
    w = next(iter(quantized(jq.load(folder)[1]).values()))
    assert w.scale.dtype == jnp.float32
    assert w.spec.scale_dtype == "float32"


def test_progress_and_placement(tmp_path):
    folder, _, _ = folders.write(tmp_path, gptq_config(), folders.gptq_linear)
    calls, placed = [], {}
    device = jax.devices()[0]

    def shardings(path, shape):
        placed[path] = shape
        return SingleDeviceSharding(device)

    _, params = jq.load(folder, shardings=shardings, progress=lambda *call: calls.append(call))
    tensors = len(list(tree.leaves(params)))
    assert [done for done, _, _ in calls] == list(range(1, tensors + 1))
    assert {total for _, total, _ in calls} == {tensors}
    assert calls[-1][2] == "layers_1/mlp/down_proj/kernel"
    assert placed["layers_0/attention/q_proj/kernel/codes"] == (16, 32)
    assert placed["layers_0/attention/q_proj/kernel/order"] == (32,)
    assert len(placed) == tensors + 14 * 3


def test_nothing_points_into_the_files(tmp_path):
    folder, _, _ = folders.write(tmp_path, ct_config(FLOAT8), folders.float8_linear)
    _, params = jq.load(folder)
    before = jax.tree.map(np.array, params)
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, params))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_rest_keeps_its_dtype(tmp_path, dtype):
    folder, _, stored = folders.write(tmp_path, gptq_config(), folders.gptq_linear)
    raw = json.loads((folder / "config.json").read_text())
    kind = getattr(ml_dtypes, dtype, dtype)
    rest = {
        k: a.astype(kind) for k, a in stored.items() if k.endswith("weight") and a.dtype != np.int32
    }
    folders.write_tensors(folder, raw, stored | rest)
    _, params = jq.load(folder)
    assert params["embed"]["embedding"].dtype == dtype
    assert params["lm_head"]["kernel"].dtype == dtype


def test_folders_that_are_not_quantized_are_no_business_of_the_reader(tmp_path):
    checkpoints.write(tmp_path, folders.RAW)
    with pytest.raises(ModelError, match=r"config\.json has no quantization_config"):
        QuantizedCheckpoint(tmp_path)
    with pytest.raises(ModelError, match="is not a folder"):
        QuantizedCheckpoint(tmp_path / "nowhere")
    assert not is_quantized_folder(tmp_path / "nowhere")
    checkpoint = QuantizedCheckpoint(folders.write(tmp_path, gptq_config(), folders.gptq_linear)[0])
    with pytest.raises(ModelError, match="no block 'layers_2'; blocks are layers_0 to layers_1"):
        checkpoint.block("layers_2")
