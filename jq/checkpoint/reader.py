"""Read a checkpoint, part by part, and believe nothing that was not verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jq import tree
from jq.checkpoint import format as fmt
from jq.checkpoint import orbax_io
from jq.checkpoint.digests import array_digest, file_entry, in_threads
from jq.checkpoint.direct import (
    chunk_digests,
    direct_sharding,
    joined,
    misfits,
    stored_sharding,
)
from jq.checkpoint.format import ArrayEntry, Manifest, PartEntry, QTensorEntry
from jq.checkpoint.manifest import parse_manifest
from jq.checkpoint.parts import check_part, nest
from jq.checkpoint.shards import chunk_slices
from jq.errors import CheckpointError
from jq.qtensor import QTensor

Shardings = Callable[[str, tuple[int, ...]], Any]


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a jaxq manifest (which may still be damaged)."""
    return Path(path, fmt.MANIFEST).is_file()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and check jaxq.json of a checkpoint folder.

    Raises CheckpointError where there is none, or naming the entry that is wrong
    (see `jq.checkpoint.manifest.parse_manifest`).
    """
    file = Path(path, fmt.MANIFEST)
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(
            f"{file} is missing: {path} is no jaxq checkpoint, or its copy is incomplete"
        )
    return parse_manifest(file.read_bytes(), str(file))


def check_files(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Compare the copied files (config, tokenizer, ...) with their digests in the manifest.

    generation_config.json and report.json are the user's to edit, and are not compared.
    Raises CheckpointError naming the first file that is missing or differs.
    """
    for name, entry in manifest.files.items():
        if name in ("generation_config.json", fmt.REPORT):
            continue
        file = Path(path, name)
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete; copy it again")
        found = file_entry(file)
        if found != entry:
            raise CheckpointError(
                f"{file} is not what was written: {found.bytes} bytes with sha256 {found.sha256}, "
                f"the manifest says {entry.bytes} bytes with {entry.sha256}; copy it again"
            )


def load_params(
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    shardings: Shardings | None = None,
    parts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Load the parameter tree, with QTensors where they were.

    Args:
      path: a checkpoint folder.
      verify: compare the digest of every tensor. Sizes, shapes and dtypes are compared always.
      shardings: maps an array's path ("layers_0/mlp/up_proj/kernel/codes") and shape to the
        jax.sharding.Sharding it shall have; None, as a function or as a result, is JAX's default
        device. Arrays that have a digest per chunk (see `jq.checkpoint.format`), and whose shards
        are made of whole chunks, are restored straight into it: every process reads and verifies
        the chunks of its own devices only. Of all other arrays it reads and verifies the whole,
        one part at a time, and keeps its own shards.
      parts: which top-level keys to load; all when None.
    Returns: nested dicts of jax.Array and QTensor, bit for bit what was written.
    Raises: CheckpointError naming the tensor and what disagrees; nothing is ever cast.
    """
    return dict(iter_parts(path, verify=verify, shardings=shardings, parts=parts))


def iter_parts(
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    shardings: Shardings | None = None,
    parts: Sequence[str] | None = None,
) -> Iterator[tuple[str, Any]]:
    """(name, subtree) of each part; arguments and errors as `load_params`.

    One part is read at a time, so host memory holds no more than that beside what the caller keeps.
    """
    manifest = read_manifest(path)
    names = tuple(manifest.parts) if parts is None else parts
    for name in names:
        if name not in manifest.parts:
            raise CheckpointError(
                f"{path} has no part {name!r}; it has {', '.join(manifest.parts) or 'none'}"
            )
    folder = Path(path, fmt.PARAMS)
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link; copy it with its links resolved")
    for name in names:
        part = manifest.parts[name]
        arrays = read_part(folder / name, name, part, verify=verify, shardings=shardings)
        yield name, part_tree(name, part, arrays, shardings)


def part_tree(
    name: str,
    part: PartEntry,
    arrays: Mapping[str, Any],
    shardings: Shardings | None = None,
) -> Any:
    """The subtree of a part whose arrays were read.  jax.Arrays stay where they are."""
    placed = {
        key: array if isinstance(array, jax.Array) else place_array(key, array, shardings)
        for key, array in arrays.items()
    }
    return nest(_tensors(part, placed))[name]


def read_part(
    folder: Path,
    name: str,
    part: PartEntry,
    *,
    verify: bool,
    shardings: Shardings | None = None,
) -> dict[str, Any]:
    """Every array of a part, by path, checked: on its devices where it can go straight there (see
    `load_params`), and else on the host.

    Raises: see `load_params`.
    """
    check_part(folder, part, verify=verify)
    entries = dict(part.arrays())
    stored = {path: entry for path, entry in entries.items() if entry.nbytes}
    orders = {
        f"{path}/order"
        for path, entry in part.tensors.items()
        if isinstance(entry, QTensorEntry) and "order" in entry.fields
    }
    direct = {
        path: sharding
        for path, entry in stored.items()
        if shardings is not None and entry.chunks
        if path not in orders  # which are looked at on the host
        if (sharding := direct_sharding(path, entry, shardings(path, entry.shape))) is not None
    }
    arrays = _read_stored(folder, name, stored, direct) if stored else {}
    for path, entry in entries.items():
        if not entry.nbytes:
            arrays[path] = np.zeros(entry.shape, jnp.dtype(entry.dtype))
    if verify:
        in_threads(lambda path: _check_digest(path, arrays[path], entries[path]), entries)
    for path in orders:
        _check_order(path, arrays[path])
    return {path: arrays[path] for path in entries}


def _read_stored(
    folder: Path, name: str, entries: Mapping[str, ArrayEntry], direct: Mapping[str, Sharding]
) -> dict[str, Any]:
    target = {
        path: orbax_io.abstract(
            jnp.dtype(entry.dtype),
            entry.stored_shape,
            stored_sharding(entry, direct[path]) if path in direct else None,
        )
        for path, entry in entries.items()
    }
    try:
        # Orbax would cast to the target's dtype without a word: compare before it can.
        found = orbax_io.stored_arrays(folder)
        _check_stored(folder, found, entries)
        arrays = dict(tree.leaves(orbax_io.load_tree(folder, nest(target))))
    except (CheckpointError, jax.errors.JaxRuntimeError):  # the latter: a device has no room
        raise
    except Exception as error:  # whatever Orbax, TensorStore or JSON make of damaged files
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder}: part {name!r} cannot be read ({type(error).__name__}: {reason}): "
            "it is damaged; copy it again"
        ) from error
    _check_stored(folder, {p: (a.dtype.name, a.shape) for p, a in arrays.items()}, entries)
    for path, entry in entries.items():
        if path in direct:
            arrays[path] = joined(entry, arrays[path], direct[path])
        else:
            arrays[path] = arrays[path].reshape(entry.shape)
    return arrays


def _check_stored(
    folder: Path, found: Mapping[str, tuple[str, tuple[int, ...]]], wanted: Mapping[str, ArrayEntry]
) -> None:
    for path in wanted.keys() ^ found.keys():
        has, lacks = ("manifest", "data") if path in wanted else ("data", "manifest")
        raise CheckpointError(f"{path}: is in the {has} of {folder}, but not in its {lacks}")
    for path, entry in wanted.items():
        dtype, shape = found[path]
        if (dtype, shape) != (entry.dtype, entry.stored_shape):
            raise CheckpointError(
                f"{path}: the manifest says {entry.dtype}{list(entry.stored_shape)}, "
                f"but {dtype}{list(shape)} is stored: the checkpoint was tampered with or damaged"
            )


def _check_digest(path: str, array: np.ndarray | jax.Array, entry: ArrayEntry) -> None:
    for found, wanted in _digests(array, entry):
        if found != wanted:
            raise CheckpointError(
                f"{path}: sha256 of the stored data is {found}, but the manifest says {wanted}: "
                "the data is damaged; copy it again"
            )


def _digests(array: np.ndarray | jax.Array, entry: ArrayEntry) -> Iterator[tuple[str, str]]:
    if isinstance(array, jax.Array):
        yield from chunk_digests(entry, array)
        return
    places: list[Any] = [...]
    if entry.chunks:
        places = chunk_slices(entry.shape, entry.chunk_shape)
    for place, wanted in zip(places, entry.chunks or (entry.sha256,), strict=True):
        yield array_digest(array[place]), wanted


def _check_order(path: str, order: np.ndarray) -> None:
    expected = np.broadcast_to(np.arange(order.shape[-1], dtype=order.dtype), order.shape)
    if not np.array_equal(np.sort(order, axis=-1), expected):
        raise CheckpointError(f"{path}: is no permutation of 0 to {order.shape[-1] - 1}")


def place_array(path: str, array: np.ndarray, shardings: Shardings | None) -> jax.Array:
    """The array on the devices that `shardings` says, or whole on the default device."""
    sharding = None if shardings is None else shardings(path, array.shape)
    if sharding is None:
        return jnp.asarray(array)
    with misfits(path, array.shape, sharding):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _tensors(part: PartEntry, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    return {
        path: arrays[path] if isinstance(entry, ArrayEntry) else _qtensor(path, entry, arrays)
        for path, entry in part.tensors.items()
    }


def _qtensor(path: str, entry: QTensorEntry, arrays: Mapping[str, jax.Array]) -> QTensor:
    return QTensor(
        codes=arrays[f"{path}/codes"],
        scale=arrays[f"{path}/scale"],
        zero_point=arrays.get(f"{path}/zero_point"),
        order=arrays.get(f"{path}/order"),
        input_scale=arrays.get(f"{path}/input_scale"),
        spec=entry.spec,
        k=entry.k,
        n=entry.n,
    )
