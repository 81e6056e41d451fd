"""Small parameter trees with every kind of leaf, and byte-wise comparison."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jq import qtensor
from jq.checkpoint import CheckpointWriter
from jq.checkpoint.digests import array_digest, bytes_entry, joint_digest
from jq.checkpoint.shards import chunk_slices
from jq.qtensor import QTensor
from jq.spec import QuantSpec, w4a16, w8a8

SPECS = {
    "int4": w4a16(8),
    "int4_zeros": w4a16(8, symmetric=False),
    "int3_zeros": QuantSpec("int3", 8, False, scale_dtype="float16"),
    "int2_channel": QuantSpec("int2", -1),
    "int8_zeros": QuantSpec("int8", 8, False),
    "w8a8": w8a8(),
    "w8a8_static": w8a8(activation="tensor", static=True),
    "fp8": w8a8("float8_e4m3fn"),
    "fp8_tensor": w8a8("float8_e4m3fn", weight="tensor"),
    "fp8_block": QuantSpec(
        "float8_e4m3fn",
        8,
        granularity="block",
        scale_dtype="float32",
        activation=w8a8("float8_e4m3fn", activation="group", weight="block").activation,
    ),
}


def quantized(
    spec: QuantSpec, k: int = 24, n: int = 16, lead: tuple[int, ...] = (), *, ordered=False, seed=0
) -> QTensor:
    """A QTensor of random bits (NaNs among the floats), with the shapes that `from_codes` gives."""
    rng = np.random.default_rng(seed)
    scale_shape = (*lead, *spec.scale_shape(k, n))
    static = spec.activation is not None and spec.activation.static
    shapes = jax.eval_shape(
        lambda: qtensor.from_codes(
            jnp.zeros((*lead, k, n), jnp.float8_e4m3fn if spec.is_float else jnp.uint8),
            jnp.zeros(scale_shape),
            None if spec.symmetric else jnp.zeros(scale_shape),
            spec,
            order=jnp.zeros((*lead, k), jnp.int32) if ordered else None,
            input_scale=jnp.zeros(lead) if static else None,
        )
    )

    def fill(leaf):
        bits = rng.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), dtype=np.uint8)
        return jnp.asarray(bits.view(leaf.dtype)[..., 0])

    filled = jax.tree.map(fill, shapes)
    if not ordered:
        return filled
    rows = np.broadcast_to(np.arange(k, dtype=np.int32), (*lead, k))
    return dataclasses.replace(filled, order=jnp.asarray(rng.permuted(rows, axis=-1)))


def small_tree(seed: int = 0) -> dict:
    """Two parts: an embedding and a block with a norm and two linears."""
    rng = np.random.default_rng(seed)
    return {
        "embed": {"embedding": jnp.asarray(rng.normal(size=(32, 24)), jnp.bfloat16)},
        "layers_0": {
            "input_norm": {"scale": jnp.asarray(rng.normal(size=24), jnp.float32)},
            "mlp": {
                "up_proj": {"kernel": quantized(w4a16(8), ordered=True, seed=seed)},
                "down_proj": {"kernel": quantized(w8a8(), 16, 24, seed=seed)},
            },
        },
    }


def write(path: Path, params: dict, **options) -> Path:
    """Write all of a tree; options go to the writer."""
    with CheckpointWriter(path, **options) as writer:
        for name, subtree in params.items():
            writer.write_part(name, subtree)
        writer.finish({"recipe": "test"})
    return path


def assert_same(found, expected) -> None:
    """Equal structure (static fields included), dtypes, shapes and bytes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def data_file(folder: Path, path: str) -> Path:
    """The file that holds an array's data."""
    part = path.split("/")[0]
    (file,) = (folder / "params" / part / "state" / path.replace("/", ".")).glob("[0-9]*")
    return file


def cut_into_chunks(folder: Path, path: str, chunk: tuple[int, ...]) -> None:
    """Store an array of a checkpoint in chunks of this shape, as several processes write it.

    path: a plain array's, or that of a field of a QTensor (".../kernel/codes").
    """
    manifest = json.loads((folder / "jaxq.json").read_text())
    part = manifest["parts"][path.split("/")[0]]
    owner, _, field = path.rpartition("/")
    tensors = part["tensors"]
    entry = tensors[path] if path in tensors else tensors[owner]["fields"][field]
    file, shape = data_file(folder, path), entry["shape"]
    array = np.frombuffer(file.read_bytes(), jnp.dtype(entry["dtype"])).reshape(shape)
    file.unlink()
    pieces = [array[place] for place in chunk_slices(array.shape, chunk)]
    for piece, at in zip(pieces, np.ndindex(*np.floor_divide(shape, chunk)), strict=True):
        file.with_name(".".join(map(str, at))).write_bytes(piece.tobytes())
    zarray = file.with_name(".zarray")
    zarray.write_text(json.dumps(json.loads(zarray.read_text()) | {"chunks": chunk}))
    name = zarray.relative_to(folder / "params" / path.split("/")[0]).as_posix()
    part["files"][name] = dataclasses.asdict(bytes_entry(zarray.read_bytes()))
    found = [array_digest(piece) for piece in pieces]
    entry |= {"sha256": joint_digest(found), "chunk_shape": chunk, "chunks": found}
    manifest["format_version"] = 2
    (folder / "jaxq.json").write_text(json.dumps(manifest))
