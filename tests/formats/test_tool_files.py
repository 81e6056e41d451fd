"""Files that the tools themselves have written, where there are any.

JAXQ_TOOL_FOLDERS names a folder of model folders (GPTQModel's, AutoAWQ's, llm-compressor's).
"""

import dataclasses
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq import tree
from jq.formats import awq, compressed_tensors, gptq
from jq.formats.reader import QuantizedCheckpoint
from jq.models.hf_names import weight_table
from jq.models.safetensors_file import SafetensorsFile
from tests.oracles import packed_files as oracle

_ROOT = Path(__file__).resolve().parents[2]
_TOLD = os.environ.get("JAXQ_TOOL_FOLDERS")
FOLDERS = sorted(p.parent for p in Path(_TOLD).glob("*/config.json")) if _TOLD else []
_DATA = Path(os.environ.get("JAXQ_REFERENCE_DATA", _ROOT.parent / "shared"))
SLOW_READER = _DATA / "formats" / "oracle_reader.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDERS, reason="JAXQ_TOOL_FOLDERS names no folder of model folders"),
]
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def stored(checkpoint):
    """Module -> suffix -> array."""
    found = {}
    for file in map(SafetensorsFile, checkpoint.files):
        for key in file.tensors:
            module, _, suffix = key.rpartition(".")
            found.setdefault(module, {})[suffix] = np.array(file.read(key))
    return found


def linears(checkpoint):
    """(module, path, scheme) of every quantized linear."""
    for entry in weight_table(checkpoint.config):
        module = entry.key.removesuffix(".weight")
        scheme = checkpoint.quantization.scheme(module) if entry.transpose else None
        if scheme is not None:
            yield module, entry.path, scheme


def slowly(tensors, scheme):
    """float64 [K, N], by the oracle."""
    match scheme:
        case gptq.GPTQScheme():
            return oracle.read_gptq(tensors, scheme.bits, 1 + (scheme.checkpoint_format != "gptq"))
        case awq.AWQScheme():
            codes, zeros = (oracle.unpack_awq(tensors[name]) for name in ("qweight", "qzeros"))
            groups = np.arange(codes.shape[0]) // (codes.shape[0] // zeros.shape[0])
            return oracle.Linear(4, codes, zeros, tensors["scales"], groups).weight
    if scheme.format == "pack-quantized":
        return oracle.read_packed(tensors, scheme.num_bits)
    if scheme.type == "float":
        return oracle.float8_weight(tensors["weight"], tensors["weight_scale"])
    zeros = np.zeros_like(tensors["weight_scale"].T, np.int64)
    groups = np.zeros(tensors["weight"].shape[1], np.int64)
    return oracle.Linear(8, tensors["weight"].T, zeros, tensors["weight_scale"].T, groups).weight


def dequantized(w):
    return np.asarray(jax.tree.map(jnp.asarray, w).dequantize())


@each_folder
def test_a_linear_is_what_the_oracle_reads(folder):
    checkpoint = QuantizedCheckpoint(folder)
    params, arrays = checkpoint.load(), stored(checkpoint)
    module, path, scheme = next(x for x in linears(checkpoint) if "k_proj" in x[0])
    want = slowly(arrays[module], scheme).astype(np.float32)
    np.testing.assert_array_max_ulp(dequantized(tree.get(params, path)), want, 1)


@each_folder
def test_every_linear_is_written_as_it_was(folder):
    checkpoint = QuantizedCheckpoint(folder)
    params, arrays = checkpoint.load(), stored(checkpoint)
    for module, path, scheme in linears(checkpoint):
        w = tree.get(params, path)
        if not isinstance(scheme, compressed_tensors.CompressedTensorsScheme):
            scheme = dataclasses.replace(scheme, scale_dtype=w.spec.scale_dtype)
        match scheme:
            case gptq.GPTQScheme():
                got = gptq.from_qtensor(w, scheme, path)
            case awq.AWQScheme():
                got = awq.from_qtensor(w, scheme, path)
            case _:
                got = compressed_tensors.from_qtensor(w, scheme, path)
        assert got.keys() == arrays[module].keys() - {"bias"}
        for name, array in got.items():
            np.testing.assert_array_equal(array, arrays[module][name], strict=True)


@each_folder
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # it leaves files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not SLOW_READER.is_file(), reason="no reference reader")
def test_every_linear_is_what_the_reference_reader_reads(folder):
    checkpoint = QuantizedCheckpoint(folder)
    if any(scheme.spec("float16").bits == 3 for *_, scheme in linears(checkpoint)):
        pytest.skip("the reference reader knows no 3 bits")
    spec = importlib.util.spec_from_file_location("reference_reader", SLOW_READER)
    assert spec
    assert spec.loader
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    _, weights, *_ = reader.load(str(folder))
    params = checkpoint.load()
    found = list(linears(checkpoint))
    assert len(found) == len(weights)
    for module, path, _ in found:
        want = weights[f"{module}.weight"].T.astype(np.float32)
        np.testing.assert_array_max_ulp(dequantized(tree.get(params, path)), want, 1)
