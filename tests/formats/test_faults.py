"""Damaged and lying folders of other tools: refused by name, before anything comes of them."""

import json
import pickle
import struct
import time

import numpy as np
import pytest

import jq
from jq.checkpoint.digests import array_digest
from jq.checkpoint.format import EXPORT_MANIFEST
from jq.errors import CheckpointError, JaxqError, ModelError
from jq.formats.reader import QuantizedCheckpoint
from jq.models.safetensors_file import SafetensorsFile
from tests.formats import folders
from tests.formats.folders import awq_config, ct_config, edit_config, gptq_config, group

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def gptq(tmp_path):
    """A folder, and what is in it."""
    folder, _, stored = folders.write(tmp_path, gptq_config(), folders.gptq_linear)
    return folder, stored


def rewrite(folder, stored, **changes):
    """Replace tensors ("SUFFIX": array or None to leave it out) of one linear."""
    tensors = dict(stored)
    for suffix, array in changes.items():
        del tensors[f"{Q}.{suffix}"]
        if array is not None:
            tensors[f"{Q}.{suffix}"] = array
    raw = json.loads((folder / "config.json").read_text())
    folders.write_tensors(folder, raw, tensors)


# The config lies.


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (
            {"bits": 8},
            r"layers\.0\..*qweight: shape \[4, 32\], expected \[8, 32\], since bits is 8",
        ),
        ({"bits": 3}, r"\.qweight: shape \[4, 32\], expected \[3, 32\], since bits is 3"),
        ({"group_size": 32}, r"\.qzeros: shape \[2, 4\], expected \[1, 4\].* group_size 32"),
        ({"group_size": 5}, r"group_size 5 does not divide its 32 inputs"),
        ({"desc_act": False}, r"\.g_idx: input .* desc_act is false"),
        ({"sym": True}, r"\.qzeros: the zero at .* but sym is true"),
        ({"quant_method": "awq", "version": "gemm"}, r"unexpected \(14\): .*g_idx"),
        ({"quant_method": "exl3"}, r"config.json: .*quant_method 'exl3' cannot be read"),
        ({"dynamic": {"-:.*q_proj": {}}}, r"missing \(2\): .*q_proj.weight.*; unexpected \(8\)"),
    ],
)
def test_configs_that_lie_about_the_weights(gptq, lie, message):
    folder, _ = gptq
    edit_config(folder, **lie)
    with pytest.raises(JaxqError, match=message):
        jq.load(folder)


def test_configs_that_lie_about_shapes(gptq):
    folder, _ = gptq
    raw = json.loads((folder / "config.json").read_text())
    raw["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"gate_proj.qweight: shape \[4, 48\], expected \[4,"):
        jq.load(folder)
    raw |= {"intermediate_size": 48, "vocab_size": 65}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"embed_tokens.weight: expected shape \(65, 32\), found"):
        jq.load(folder)


def test_weights_that_the_config_says_are_quantized(gptq):
    folder, stored = gptq
    tensors = {key: array for key, array in stored.items() if not key.startswith(Q)}
    tensors[f"{Q}.weight"] = np.zeros((32, 32), np.float32)
    folders.write_tensors(folder, json.loads((folder / "config.json").read_text()), tensors)
    message = rf"stored in full precision, but quantized by config.json \(1\): {Q}.weight"
    with pytest.raises(ModelError, match=message):
        jq.load(folder)


@pytest.mark.parametrize(
    ("config", "linear", "message"),
    [
        (
            awq_config(group_size=32),
            folders.awq_linear,
            r"scales: shape \[2, 32\], expected \[1",
        ),
        (
            awq_config(zero_point=False),
            folders.awq_linear,
            r"qzeros: has a zero of \d+, but zer",
        ),
        (ct_config(group(num_bits=8)), folders.packed_linear, r"weight_packed: shape \[32, 4\]"),
        (ct_config(group(group_size=8)), folders.packed_linear, r"weight_scale: shape \[32, 2\]"),
        (ct_config(group(symmetric=False)), folders.packed_linear, r"weight_zero_point is missing"),
        (
            ct_config(group("naive-quantized")),
            folders.packed_linear,
            r"missing \(14\): .*q_proj.we",
        ),
        (
            ct_config(group("naive-quantized", num_bits=4, strategy="channel")),
            folders.int8_linear,
            r"q_proj.weight: values from -\d+ to \d+ do not fit the 4 bits",
        ),
        (
            ct_config(group("naive-quantized", num_bits=8, type="float", strategy="channel")),
            folders.int8_linear,
            r"q_proj.weight: dtype int8, expected float8_e4m3fn",
        ),
    ],
)
def test_configs_of_the_other_formats_that_lie(tmp_path, config, linear, message):
    folder, _, _ = folders.write(tmp_path, config, linear)
    with pytest.raises(JaxqError, match=message):
        jq.load(folder)


def test_float8_without_a_scheme_is_no_weight_in_full_precision(tmp_path):
    config = ct_config(
        group("float-quantized", num_bits=8, type="float", strategy="channel"),
        ignore=["lm_head", "re:.*down_proj"],
    )
    folder, _, _ = folders.write(tmp_path, config, folders.float8_linear)
    with pytest.raises(ModelError, match=r"not in full precision \(2\): .*down_proj.weight"):
        jq.load(folder)


# The tensors are damaged.


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_scales_that_are_no_positive_numbers(gptq, bad):
    folder, stored = gptq
    scales = stored[f"{Q}.scales"].copy()
    scales[1, 3] = bad
    rewrite(folder, stored, scales=scales)
    with pytest.raises(CheckpointError, match=rf"{Q}.scales: 1 of 64 .* at \[1, 3\]"):
        jq.load(folder)


def test_groups_out_of_range(gptq):
    folder, stored = gptq
    g_idx = stored[f"{Q}.g_idx"].copy()
    g_idx[7] = 2
    rewrite(folder, stored, g_idx=g_idx)
    with pytest.raises(CheckpointError, match=rf"{Q}.g_idx: input 7 is in group 2, .* 0 to 1"):
        jq.load(folder)


@pytest.mark.parametrize("suffix", ["qzeros", "scales", "g_idx"])
def test_missing_tensors(gptq, suffix):
    folder, stored = gptq
    rewrite(folder, stored, **{suffix: None})
    with pytest.raises(CheckpointError, match=rf"{Q}.{suffix} is missing"):
        jq.load(folder)


def test_a_missing_linear_and_tensors_of_none(gptq):
    folder, stored = gptq
    rewrite(folder, stored, qweight=None)
    with pytest.raises(ModelError, match=rf"missing \(1\): {Q}.qweight"):
        jq.load(folder)
    raw = json.loads((folder / "config.json").read_text())
    folders.write_tensors(folder, raw, stored | {f"{Q}.weight_packed": np.zeros(3, np.int32)})
    with pytest.raises(ModelError, match=rf"unexpected \(1\): {Q}.weight_packed"):
        jq.load(folder)


def flip(file, key, bit=5):
    """Change one bit of a tensor in the middle."""
    info = SafetensorsFile(file).tensors[key]
    data = bytearray(file.read_bytes())
    data[(info.begin + info.end) // 2] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("key", [f"{Q}.qweight", f"{Q}.qzeros", "model.norm.weight"])
def test_flipped_bits_where_there_are_digests(gptq, key):
    folder, stored = gptq
    digests = {name: array_digest(array) for name, array in stored.items()}
    (folder / EXPORT_MANIFEST).write_text(json.dumps({"sha256": digests}))
    jq.load(folder)
    flip(folder / "model.safetensors", key)
    with pytest.raises(CheckpointError, match=rf"{key}: sha256 of the stored data is"):
        jq.load(folder)
    QuantizedCheckpoint(folder, verify=False).load()


def test_digests_of_other_tensors(gptq):
    folder, stored = gptq
    digests = {name: array_digest(array) for name, array in stored.items()}
    del digests[f"{Q}.scales"]
    (folder / EXPORT_MANIFEST).write_text(json.dumps({"sha256": digests}))
    with pytest.raises(CheckpointError, match=rf"{Q}.scales: is in the weights of .*, but not in"):
        jq.load(folder)
    (folder / EXPORT_MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=r"jaxq_export.json: no sha256 of the tensors"):
        jq.load(folder)


# The files are damaged, or no files at all.


def test_truncated_files(gptq):
    folder, _ = gptq
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=rf"expected {len(data)} bytes.* {len(data) - 100}"):
        jq.load(folder)


def with_header(folder, header, length=None):
    text = header.encode()
    size = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + text)


def entry(begin, end):
    return f'{{"dtype": "U8", "shape": [{end - begin}], "data_offsets": [{begin}, {end}]}}'


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        ("{}", 2**62, "the header claims 4611686018427387904 bytes"),
        (f'{{"a": {entry(0, 4)}, "b": {entry(2, 6)}}}     ', None, "overlaps"),
        (f'{{"a": {entry(0, 4)}, "b": {entry(5, 6)}}}     ', None, "leaves a hole"),
        (f'{{"a": {entry(0, 4)}, "a": {entry(4, 6)}}}', None, "duplicate key 'a'"),
        (
            '{"a": {"dtype": "I32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}',
            None,
            "needs 73786976294838206464 bytes",
        ),
        ("[" * 100_000, None, "not valid JSON"),
    ],
)
def test_headers_that_lie_are_refused_at_once(gptq, header, length, message):
    folder, _ = gptq
    with_header(folder, header, length)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        jq.load(folder)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/{}"])
def test_indexes_that_leave_the_folder(tmp_path, name):
    folder, _, _ = folders.write(tmp_path, gptq_config(), folders.gptq_linear, shards=2)
    file = folder / folders.INDEX
    index = json.loads(file.read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = name.format(index["weight_map"][key])
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"must be plain \.safetensors names"):
        jq.load(folder)


def test_missing_duplicate_and_linked_shards(tmp_path):
    folder, _, _ = folders.write(tmp_path, gptq_config(), folders.gptq_linear, shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    saved = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelError, match=f"names '{second.name}', which is missing"):
        jq.load(folder)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=f"is in both .*{first.name} and .*{second.name}"):
        jq.load(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(saved)
    second.unlink()
    second.symlink_to(elsewhere)
    with pytest.raises(ModelError, match="outside the model's folder"):
        jq.load(folder)


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_are_never_opened_and_no_code_is_run(gptq, tmp_path):
    folder, _ = gptq
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(str(canary)))
    file = folder / "model.safetensors"
    good = file.read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data)
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(raw))
    jq.load(folder)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        jq.load(folder)
    file.unlink()
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model.bin\)"):
        jq.load(folder)
    file.write_bytes(b"PK\x03\x04" + good)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        jq.load(folder)
    assert not canary.exists()
