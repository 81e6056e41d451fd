"""Programs of several processes read checkpoints, each for itself, and write them together."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from jq.checkpoint import load_params, read_manifest
from jq.errors import CheckpointError
from tests.checkpoint.trees import assert_same, cut_into_chunks, digests, small_tree, write
from tests.processes import run_processes

PROGRAM = """
import sys, hashlib, os
from pathlib import Path
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jq.checkpoint import CheckpointWriter, load_params
from jq.errors import CheckpointError, OutputError
from tests.checkpoint.trees import assert_same, small_tree

path = Path(sys.argv[3])
expected = small_tree()
if jax.process_index() == 1:  # alone: no process waits for another
    assert_same(load_params(path, parts=["embed"]), {"embed": expected["embed"]})
ONES = np.ones(3, bool)
mesh = jax.make_mesh((jax.device_count(),), ("a",), axis_types=(AxisType.Auto,))
def columns(path, shape):
    return NamedSharding(mesh, P(None, "a") if path.endswith("codes") else P())
params = load_params(path, shardings=columns)
kernel = params["layers_0"]["mlp"]["up_proj"]["kernel"]
assert [s.data.shape for s in kernel.codes.addressable_shards] == [(12, 4)] * 2
whole = multihost_utils.process_allgather(kernel.codes, tiled=True)
wanted = expected["layers_0"]["mlp"]["up_proj"]["kernel"].codes
np.testing.assert_array_equal(whole, np.asarray(wanted))

def save(name, params):
    with CheckpointWriter(path.with_name(name), files={"config.json": b"{}"}) as writer:
        for key, subtree in params.items():
            writer.write_part(key, subtree)
        writer.finish({"note": 1})

save("sharded", params)                     # what lies on several processes
save("copied", expected)                    # what each has a copy of
save("again", params)
assert_same(load_params(path.with_name("copied")), expected)  # by every process, from its own disk
for name, leaf, error, text in [
    ("copied", expected, OutputError, "is not empty"),
    ("unequal", {"a": np.full(3, jax.process_index(), np.int8)}, CheckpointError, "not the same"),
    ("bad", {"a": object() if jax.process_index() == 0 else ONES}, CheckpointError, "neither an"),
]:
    try:
        save(name, {"part": leaf})
    except error as e:
        assert text in str(e), e
    else:
        raise AssertionError(name)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    path = write(tmp_path / "q", small_tree())
    run_processes(PROGRAM, 2, str(path), devices=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "copied", "q", "sharded"]
    assert digests(tmp_path / "again") == digests(tmp_path / "sharded")
    expected = small_tree()
    for name, chunk in [("sharded", (12, 4)), ("copied", (12, 8))]:
        assert_same(load_params(tmp_path / name), expected)
        manifest = read_manifest(tmp_path / name)
        assert manifest.format_version == 2
        codes = manifest.parts["layers_0"].tensors["layers_0/mlp/up_proj/kernel"].fields["codes"]
        assert codes.chunk_shape == chunk
        # Each chunk is a file of its own, and the digest is the file's.
        folder = tmp_path / name / "params/layers_0/state/layers_0.mlp.up_proj.kernel.codes"
        files = sorted(folder.glob("0.*"))
        assert len(files) == 16 // chunk[1]
        assert [hashlib.sha256(f.read_bytes()).hexdigest() for f in files] == list(codes.chunks)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """A checkpoint as two processes write it, made by one: chunks of 8 columns."""
    path = write(tmp_path_factory.mktemp("chunked") / "q", {"a": {"w": WIDE}})
    cut_into_chunks(path, "a/w", (4, 8))
    return path


WIDE = np.arange(64, dtype=np.int8).reshape(4, 16)


def test_chunks_are_read_as_one(chunked):
    np.testing.assert_array_equal(load_params(chunked)["a"]["w"], WIDE)


def test_a_flipped_bit_in_a_chunk(chunked, tmp_path):
    copy = shutil.copytree(chunked, tmp_path / "q")
    file = copy / "params/a/state/a.w/0.1"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="a/w: sha256 of the stored data is"):
        load_params(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_shape": [4, 5]}, r"2 chunks of \[4, 5\] do not make up \[4, 16\]"),
        ({"chunk_shape": [4, 0]}, r"2 chunks of \[4, 0\]"),
        ({"chunk_shape": [8]}, r"2 chunks of \[8\]"),
        ({"chunk_shape": [2, 8]}, r"2 chunks of \[2, 8\]"),
        ({"chunks": ["0" * 64, "1" * 64]}, "sha256 is not that of the chunks' digests"),
        ({"chunks": ["0" * 64, "x" * 64]}, "is not a sha256"),
    ],
)
def test_a_manifest_that_lies_about_chunks(chunked, tmp_path, change, words):
    copy = shutil.copytree(chunked, tmp_path / "q")
    manifest = json.loads((copy / "jaxq.json").read_text())
    manifest["parts"]["a"]["tensors"]["a/w"] |= change
    (copy / "jaxq.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=words):
        load_params(copy)
