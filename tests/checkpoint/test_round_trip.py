"""What is written comes back bit for bit."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from jq.checkpoint import (
    CheckpointWriter,
    is_checkpoint,
    iter_parts,
    load_params,
    read_manifest,
)
from jq.checkpoint import format as fmt
from jq.errors import CheckpointError
from tests.checkpoint.trees import (
    SPECS,
    assert_same,
    data_file,
    digests,
    quantized,
    small_tree,
    write,
)

ROOT = Path(__file__).parents[2]


def test_every_kind_of_qtensor(tmp_path):
    params = {name: {"kernel": quantized(spec)} for name, spec in SPECS.items()}
    params["order"] = {"kernel": quantized(SPECS["int4"], ordered=True)}
    params["odd_sizes"] = {"kernel": quantized(SPECS["int2_channel"], k=21, n=5)}
    params["stacked"] = {
        "ordered": quantized(SPECS["int3_zeros"], lead=(2, 3), ordered=True),
        "static": quantized(SPECS["w8a8_static"], lead=(3,)),
        "blocks": quantized(SPECS["fp8_block"], lead=(3,)),
    }
    assert_same(load_params(write(tmp_path / "q", params)), params)


@pytest.mark.parametrize("dtype", fmt.DTYPES)
def test_every_dtype_and_rank(tmp_path, dtype):
    rng = np.random.default_rng(1)

    def random(*shape):
        """Random bits, NaNs with payloads and subnormals included."""
        if dtype == "bool":
            return rng.integers(0, 2, shape) > 0
        bits = rng.integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), dtype=np.uint8)
        return bits.view(jnp.dtype(dtype))[..., 0]

    shapes = {"scalar": (), "vector": (5,), "matrix": (3, 4), "five": (2, 1, 3, 1, 2)}
    arrays = {name: jnp.asarray(random(*shape)) for name, shape in shapes.items()}
    empty = {"none": jnp.zeros((0,), dtype), "rows": jnp.zeros((0, 4), dtype)}
    params = {"full": arrays, "mixed": {**arrays, **empty}, "empty": empty}
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    assert_same(load_params(write(tmp_path / "q", params)), params)


def test_constants_that_look_like_missing_data(tmp_path):
    params = {"zeros": {"w": jnp.zeros((4, 4))}, "nans": {"w": jnp.full((4, 4), jnp.nan)}}
    assert_same(load_params(write(tmp_path / "q", params)), params)


def test_numpy_of_any_memory_layout(tmp_path):
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    params = {"w": {"turned": matrix.T, "strided": matrix[:, ::2], "big": matrix.astype(">f4")}}
    found = load_params(write(tmp_path / "q", params))["w"]
    for name, expected in params["w"].items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_array_equal(found[name], expected)


def test_parts_that_are_leaves(tmp_path):
    params = {"scale": jnp.ones(3), "kernel": quantized(SPECS["int4"])}
    assert_same(load_params(write(tmp_path / "q", params)), params)


def test_chosen_parts_in_the_order_asked_for(tmp_path):
    params = small_tree() | {"final_norm": {"scale": jnp.ones(4)}}
    path = write(tmp_path / "q", params)
    assert [name for name, _ in iter_parts(path)] == list(params)
    assert_same(load_params(path, parts=["final_norm"]), {"final_norm": params["final_norm"]})
    assert [name for name, _ in iter_parts(path, parts=("final_norm", "embed"))] == [
        "final_norm",
        "embed",
    ]
    with pytest.raises(CheckpointError, match="no part 'layers_7'; it has embed, layers_0"):
        load_params(path, parts=["layers_7"])


def test_the_manifest_says_what_is_there(tmp_path):
    params = small_tree()
    path = write(tmp_path / "q", params, files={"config.json": b"{}", "tokenizer.json": b"[]"})
    manifest = read_manifest(path)
    assert manifest.meta == {"recipe": "test"}
    assert manifest.versions["jax"] == jax.__version__
    assert manifest.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    entry = manifest.parts["layers_0"].tensors["layers_0/mlp/up_proj/kernel"]
    kernel = params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(entry, fmt.QTensorEntry)
    assert (entry.spec, entry.k, entry.n) == (kernel.spec, 24, 16)
    assert set(entry.fields) == {"codes", "scale", "order"}
    assert (path / "config.json").read_bytes() == b"{}"
    assert is_checkpoint(path)
    assert not is_checkpoint(tmp_path)


def test_files_hold_the_bytes_that_were_digested(tmp_path):
    """`sha256sum` of a data file is the digest of the manifest."""
    params = small_tree()
    path = write(tmp_path / "q", params)
    found = dict(entry for part in read_manifest(path).parts.values() for entry in part.arrays())
    assert len(found) == len(jax.tree.leaves(params))
    for name, entry in found.items():
        data = data_file(path, name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        assert len(data) == entry.nbytes
    scale = params["layers_0"]["input_norm"]["scale"]
    assert data_file(path, "layers_0/input_norm/scale").read_bytes() == np.asarray(scale).tobytes()


def test_equal_inputs_give_equal_files(tmp_path):
    first = write(tmp_path / "a", small_tree(), files={"config.json": b"{}"})
    second = write(tmp_path / "deeper" / "b", small_tree(), files={"config.json": b"{}"})
    assert digests(first) == digests(second)
    other = write(tmp_path / "c", small_tree(seed=1), files={"config.json": b"{}"})
    assert digests(first) != digests(other)


def test_orbax_reads_it_without_us(tmp_path):
    params = small_tree()
    path = write(tmp_path / "q", params)
    target = {"embed": {"embedding": np.zeros((32, 24), jnp.bfloat16)}}
    found = ocp.load(str(path / "params" / "embed"), target)
    assert found["embed"]["embedding"].tobytes() == (
        np.asarray(params["embed"]["embedding"]).tobytes()
    )


def test_without_verification_the_same(tmp_path):
    params = small_tree()
    assert_same(load_params(write(tmp_path / "q", params), verify=False), params)


def test_config_files_are_copied_as_they_are(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    config = b'{ "auto_map": {"AutoModel": "evil.Evil"},\r\n "b": 1e5 }'
    (model / "config.json").write_bytes(config)
    (model / "tokenizer.json").write_bytes(b"\xff\x00 any bytes")
    (model / "evil.py").write_text("raise SystemExit")
    path = write(tmp_path / "q", small_tree(), config_files_from=model, files={"note.txt": b"hi"})
    assert (path / "config.json").read_bytes() == config
    assert (path / "tokenizer.json").read_bytes() == b"\xff\x00 any bytes"
    assert sorted(p.name for p in path.iterdir()) == [
        *("config.json", "jaxq.json", "note.txt", "params", "tokenizer.json")
    ]


def test_meta_and_report(tmp_path):
    path = tmp_path / "q"
    meta = {"seed": np.int64(3), "loss": np.float32(0.5), "bad": float("nan"), "t": (1, None)}
    with CheckpointWriter(path) as writer:
        writer.finish(meta, report={"layers_0": {"error": 0.25}})
    assert read_manifest(path).meta == {"seed": 3, "loss": 0.5, "bad": None, "t": [1, None]}
    assert json.loads((path / "report.json").read_text()) == {"layers_0": {"error": 0.25}}
    assert load_params(path) == {}


def test_one_device_sharding_is_used(tmp_path):
    path = write(tmp_path / "q", small_tree())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = []

    def shardings(name, shape):
        asked.append((name, shape))
        return sharding if name == "embed/embedding" else None

    assert_same(load_params(path, shardings=shardings), small_tree())
    assert ("layers_0/mlp/down_proj/kernel/codes", (16, 24)) in asked
    assert len(asked) == len(jax.tree.leaves(small_tree()))


ON_EIGHT = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jq.checkpoint import load_params
from jq.errors import CheckpointError
from tests.checkpoint.trees import assert_same, small_tree

for shape in [(1, 1), (2, 1), (1, 4), (2, 4), (8, 1)]:
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("a", "b"), devices=devices, axis_types=(AxisType.Auto,) * 2)
    def shardings(path, shape):
        return NamedSharding(mesh, P(None, ("a", "b")) if path.endswith("codes") else P())
    found = load_params(sys.argv[1], shardings=shardings)
    codes = found["layers_0"]["mlp"]["up_proj"]["kernel"].codes
    assert len(codes.sharding.device_set) == len(devices)
    assert codes.addressable_shards[0].data.shape == (12, 16 // len(devices))
    assert_same(found, small_tree())
mesh = jax.make_mesh((5,), ("a",), devices=jax.devices()[:5], axis_types=(AxisType.Auto,))
try:
    load_params(sys.argv[1], shardings=lambda path, shape: NamedSharding(mesh, P("a")))
except CheckpointError as error:
    assert "embed/embedding: shape [32, 24]" in str(error), error
else:
    raise AssertionError("32 rows on 5 devices")
"""


def test_meshes_of_several_devices(tmp_path):
    path = write(tmp_path / "q", small_tree())
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_EIGHT, str(path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
