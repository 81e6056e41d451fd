"""Arrays in chunks or pieces go straight to their devices, and nobody reads what others hold."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jq.cuts import CutRule
from tests.checkpoint.trees import cut_into_chunks, small_tree, write
from tests.processes import environment, run_processes

ROOT = Path(__file__).parents[2]
UP = "layers_0/mlp/up_proj/kernel"
CHUNKS = {
    f"{UP}/codes": (12, 2),  # [12, 16] in 8 by columns
    f"{UP}/scale": (3, 4),  # [3, 16] in 4 by columns
    f"{UP}/order": (3,),  # looked at as a whole: it has to be a permutation
    "layers_0/mlp/down_proj/kernel/codes": (4, 6),  # [16, 24] in a grid of 4 by 4
    "embed/embedding": (4, 24),  # [32, 24] in 8 by rows
}


@pytest.fixture
def chunked(tmp_path):
    path = write(tmp_path / "q", small_tree())
    for name, chunk in CHUNKS.items():
        cut_into_chunks(path, name, chunk)
    return path


def flip(path, name, chunk):
    part = name.split("/")[0]
    file = path / "params" / part / "state" / name.replace("/", ".") / chunk
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)


COMMON = """
import sys
from pathlib import Path
import jax, tensorstore
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jq.checkpoint import load_params, read_manifest
from jq.checkpoint.direct import direct_sharding
from jq.errors import CheckpointError
from tests.checkpoint.trees import assert_same, small_tree

UP, DOWN = (f"layers_0/mlp/{name}_proj/kernel" for name in ("up", "down"))

def placer(mesh):
    def shardings(path, shape):
        whole = path.endswith(("/order", "input_norm/scale", "down_proj/kernel/scale"))
        spec = P() if whole else P(None, "b") if "up_proj" in path else P("b", None)
        return NamedSharding(mesh, spec)
    return shardings

def bytes_read():
    name = "/tensorstore/kvstore/file/bytes_read"
    return sum(
        value["value"]
        for metric in tensorstore.experimental_collect_matching_metrics(name)
        for value in metric["values"]
    )
"""

ON_EIGHT = (
    COMMON
    + """
path = sys.argv[1]
for rows, columns in [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4)]:
    devices = jax.devices()[: rows * columns]
    mesh = jax.make_mesh((rows, columns), ("a", "b"), (AxisType.Auto,) * 2, devices=devices)
    place = placer(mesh)
    entries = dict(e for part in read_manifest(path).parts.values() for e in part.arrays())
    direct = {name for name, e in entries.items() if direct_sharding(name, e, place(name, e.shape))}
    expected = {2: {f"{UP}/codes", f"{UP}/scale", f"{DOWN}/codes", "embed/embedding"}, 1: set()}
    expected[4] = expected[2]
    expected[8] = {f"{UP}/codes", "embed/embedding"}  # the others' shards cut chunks
    assert direct == expected[columns], direct
    before = bytes_read()
    found = load_params(path, shardings=place)
    # Each chunk once, however many devices have a copy; the rest is metadata.
    assert bytes_read() - before < read_manifest(path).nbytes + 20_000
    assert_same(found, small_tree())
    assert_same(load_params(path, shardings=place, verify=False), small_tree())
    codes = found["layers_0"]["mlp"]["up_proj"]["kernel"].codes
    assert codes.sharding.is_equivalent_to(place(f"{UP}/codes", codes.shape), 2)
    assert codes.addressable_shards[0].data.shape == (12, 16 // columns)

five = placer(jax.make_mesh((5,), ("b",), (AxisType.Auto,), devices=jax.devices()[:5]))
try:
    load_params(path, shardings=five)
except CheckpointError as error:
    assert "embed/embedding: shape [32, 24] does not go with" in str(error), error
else:
    raise AssertionError("32 rows on 5 devices")
"""
)

REFUSED = (
    COMMON
    + """
for count in (1, 2, 8):  # on the host, several chunks per device, one
    mesh = jax.make_mesh((count,), ("b",), (AxisType.Auto,), devices=jax.devices()[:count])
    try:
        load_params(sys.argv[1], shardings=placer(mesh))
    except CheckpointError as error:
        assert str(error).startswith(f"{UP}/codes: sha256 of the stored data is"), error
    else:
        raise AssertionError(count)
    load_params(sys.argv[1], shardings=placer(mesh), verify=False)
"""
)


def on_eight_devices(program, path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(path)],
        env=environment(8),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_on_meshes_of_one_to_eight_devices(chunked):
    on_eight_devices(ON_EIGHT, chunked)


@pytest.mark.parametrize("chunk", ["0.0", "0.5"])
def test_a_flipped_bit_in_a_chunk(chunked, chunk):
    flip(chunked, f"{UP}/codes", chunk)
    on_eight_devices(REFUSED, chunked)


TWO = (
    COMMON
    + """
import numpy as np
from tests.checkpoint.test_direct import TABLES

mesh = jax.make_mesh((4,), ("b",), (AxisType.Auto,))
sound, damaged = sys.argv[3:]

def load(folder, part):
    before = bytes_read()
    return load_params(folder, shardings=placer(mesh), parts=[part]), bytes_read() - before

for part, expected in TABLES.items():
    found, count = load(sound, part)
    table = found[part]["w"]
    assert table.shape == expected.shape and not table.is_fully_addressable
    for shard in table.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    assert 0 <= count - expected.nbytes // 2 < 20_000, (part, count)

    # A bit of the last chunk is flipped, which is the second process's.
    try:
        load(damaged, part)
    except CheckpointError as error:
        assert jax.process_index() == 1 and f"{part}/w: sha256 of" in str(error), error
    else:
        assert jax.process_index() == 0
"""
)
TABLES = {
    "chunks": np.arange(251_000, dtype=np.float32).reshape(1000, 251),  # by hand
    "rows": np.arange(250_000, dtype=np.int32).reshape(1000, 250),
    "up_proj": np.arange(250_000, dtype=np.int32).reshape(250, 1000),  # by columns
}


class Rows(CutRule):
    def of_array(self, path, shape):
        return int(not path.startswith("rows"))


@pytest.mark.slow
def test_each_process_reads_its_part_only(tmp_path):
    """Of what several processes wrote, and of what one did."""
    params = {name: {"w": table} for name, table in TABLES.items()}
    folders = [write(tmp_path / name, params, cuts=Rows()) for name in ("q", "bad")]
    for folder in folders:
        cut_into_chunks(folder, "chunks/w", (125, 251))
    for name, chunk in [("chunks/w", "7.0"), ("rows/w", "7.0.0"), ("up_proj/w", "0.7.0")]:
        flip(folders[1], name, chunk)
    run_processes(TWO, 2, *map(str, folders), devices=2)
