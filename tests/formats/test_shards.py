"""Tensors in files of a limited size, and their index."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from jq.errors import CheckpointError, SpecError
from jq.formats.shards import ShardWriter
from jq.models.safetensors_file import SafetensorsFile

INDEX = "model.safetensors.index.json"


def stored(folder):
    """File name -> tensor name -> array."""
    files = {file.name: SafetensorsFile(file) for file in sorted(folder.glob("*.safetensors"))}
    return {name: {key: f.read(key) for key in f.tensors} for name, f in files.items()}


def write(folder, tensors, **options):
    writer = ShardWriter(folder, **options)
    for name, array in tensors.items():
        writer.add(name, array)
    return writer, writer.finish()


def test_files_are_as_full_as_they_may_be(tmp_path):
    tensors = {f"t{i}": np.full(10, i, np.uint8) for i in range(7)}
    _, names = write(tmp_path, tensors, shard_bytes=30)
    assert names == tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    found = stored(tmp_path)
    assert [list(found[name]) for name in names] == [
        ["t0", "t1", "t2"],
        ["t3", "t4", "t5"],
        ["t6"],
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 70}
    assert index["weight_map"] == {key: name for name in names for key in found[name]}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, INDEX])


def test_one_file_needs_no_index(tmp_path):
    _, names = write(tmp_path, {"a": np.zeros(3, np.int32), "nothing": np.zeros((0, 4), np.int8)})
    assert names == ("model.safetensors",)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert stored(tmp_path)["model.safetensors"]["nothing"].shape == (0, 4)


def test_a_tensor_above_the_limit_has_a_file_of_its_own(tmp_path):
    tensors = {"a": np.zeros(4, np.uint8), "b": np.zeros(99, np.uint8), "c": np.zeros(4, np.uint8)}
    write(tmp_path, tensors, shard_bytes=10)
    assert [list(keys) for keys in stored(tmp_path).values()] == [["a"], ["b"], ["c"]]


def test_any_layout_and_byte_order_is_written_as_the_same_values(tmp_path):
    square = np.arange(12, dtype=np.int32).reshape(3, 4)
    tensors = {
        "transposed": square.T,
        "strided": square[:, ::2],
        "reversed": square[::-1],
        "big": square.astype(">i4"),
        "half": square.astype(ml_dtypes.bfloat16).T,
    }
    writer, _ = write(tmp_path, tensors)
    found = stored(tmp_path)["model.safetensors"]
    for name, want in tensors.items():
        assert found[name].dtype == want.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], want)
        assert writer.digests[name] == hashlib.sha256(found[name].tobytes()).hexdigest()


def test_nothing_at_all_is_a_file_too(tmp_path):
    assert write(tmp_path, {})[1] == ("model.safetensors",)
    assert stored(tmp_path) == {"model.safetensors": {}}


@pytest.mark.parametrize("limit", [1, 1000])
def test_a_name_is_written_once(tmp_path, limit):
    writer = ShardWriter(tmp_path, limit)
    for name in ("a", "b"):
        writer.add(name, np.zeros(2, np.uint8))
    with pytest.raises(CheckpointError, match="a: was written already"):
        writer.add("a", np.zeros(2, np.uint8))


@pytest.mark.parametrize("limit", [0, -5])
def test_limits_are_positive(tmp_path, limit):
    with pytest.raises(SpecError, match=f"shard size {limit} is not positive"):
        ShardWriter(tmp_path, limit)
