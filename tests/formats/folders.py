"""Small model folders as other tools write them, and the same models with plain weights."""

import json

import ml_dtypes
import numpy as np

from jq.models.safetensors_file import write_safetensors
from tests.models import checkpoints
from tests.oracles import packed_files as oracle

RAW = checkpoints.CONFIGS["llama3"]
INDEX = "model.safetensors.index.json"


def gptq_config(**changes):
    """The entries that tools write, v1 in groups of 16 with act order."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 16,
        "sym": False,
        "desc_act": True,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "damp_percent": 0.05,
    } | changes


def awq_config(**changes):
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 16,
        "zero_point": True,
        "modules_to_not_convert": None,
    } | changes


def group(form="pack-quantized", activations=None, targets=("Linear",), **weights):
    """A config group of compressed-tensors."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 16,
        "symmetric": True,
        "actorder": None,
        "dynamic": False,
        "block_structure": None,
    } | weights
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": form,
    }


def activations(kind, **changes):
    """Dynamic ones per token."""
    return {
        "num_bits": 8,
        "type": kind,
        "strategy": "token",
        "dynamic": True,
        "symmetric": True,
    } | (changes)


def ct_config(*groups, **changes):
    """config_groups as given; the head is left out."""
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"],
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": one for i, one in enumerate(groups)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    } | changes


def gptq_linear(k, n, seed, bits=4, group_size=16, sym=False, desc_act=True, version=1):
    linear = oracle.random_linear(
        bits, k, n, group_size, symmetric=sym, act_order=desc_act, seed=seed
    )
    return oracle.gptq(linear, version), linear.weight


def awq_linear(k, n, seed):
    linear = oracle.random_linear(4, k, n, 16, seed=seed)
    return oracle.awq(linear), linear.weight


def packed_linear(k, n, seed, bits=4, symmetric=True, act_order=False):
    linear = oracle.random_linear(
        bits, k, n, 16, symmetric=symmetric, act_order=act_order, dtype="bfloat16", seed=seed
    )
    return oracle.packed(linear, symmetric=symmetric, act_order=act_order), linear.weight


def int8_linear(k, n, seed):
    linear = oracle.random_linear(8, k, n, -1, symmetric=True, dtype="bfloat16", seed=seed)
    return oracle.plain(linear, symmetric=True), linear.weight


def float8_linear(k, n, seed):
    codes = np.random.default_rng(seed).integers(0, 0x7F, (n, k)).astype(np.uint8)
    scale = np.full((n, 1), 1 / 256, np.float32)
    weight = codes.view(ml_dtypes.float8_e4m3fn)
    return {"weight": weight, "weight_scale": scale}, oracle.float8_weight(weight, scale)


def write(folder, config, linear, raw=RAW, skip=(), shards=1):
    """A model whose linears `linear(k, n, seed)` makes, and beside it its plain twin.

    Args:
      folder: gets "model" and "plain".
      config: the quantization_config.
      linear: -> (tensors by suffix, weight [k, n]); scaled so that activations stay in range.
      skip: parts of the names of linears that stay plain; the head does always.
    Returns: (the quantized folder, the plain one, all tensors written).
    """
    plain = checkpoints.random_weights(raw)
    stored = {}
    for seed, (name, array) in enumerate(plain.items()):
        quantized = "_proj.weight" in name and not any(part in name for part in skip)
        if not quantized:
            stored[name] = array
            continue
        tensors, weight = linear(*array.shape[::-1], seed)
        stored |= {f"{name.removesuffix('weight')}{s}": a for s, a in tensors.items()}
        plain[name] = np.ascontiguousarray(weight.T.astype(np.float32))
    checkpoints.write(folder / "plain", raw, plain)
    write_tensors(folder / "model", raw | {"quantization_config": config}, stored, shards)
    return folder / "model", folder / "plain", stored


def write_tensors(folder, raw, tensors, shards=1):
    """config.json and weights; several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::shards]}
        write_safetensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_config(folder, **changes):
    """Change entries of the quantization_config."""
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"] |= changes
    file.write_text(json.dumps(raw))
