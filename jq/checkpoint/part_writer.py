"""Write one part of a checkpoint: one top-level entry of the parameter tree."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jq.checkpoint import files as fs
from jq.checkpoint import format as fmt
from jq.checkpoint import orbax_io
from jq.checkpoint.digests import array_digest, in_threads, little_endian
from jq.checkpoint.format import ArrayEntry, FileEntry, PartEntry, QTensorEntry
from jq.checkpoint.parts import nest, other_files
from jq.errors import CheckpointError, OutputError
from jq.qtensor import QTensor

_FIELDS = tuple(f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static"))
# Room for Orbax's small files: per part, and per array.
_PART_OVERHEAD, _ARRAY_OVERHEAD = 32_768, 8_192


def save_part(folder: Path, name: str, subtree: Any) -> PartEntry:
    """Write a part into a folder, which is made or replaced, and sync it to the disk.

    Args:
      folder: its parent exists.
      name: the part's key in the parameter tree.
      subtree: nested dicts of arrays and QTensors, or one of those.
    Returns: what the manifest holds of it.
    Raises: see `CheckpointWriter.write_part`.
    """
    arrays: dict[str, np.ndarray] = {}
    tensors: dict[str, QTensor | None] = {}
    for path, leaf in _leaves("", name, subtree):
        tensors[path] = _add_leaf(path, leaf, arrays)
    _check_stored_names(arrays)
    digests = dict(zip(arrays, in_threads(array_digest, arrays.values()), strict=True))
    entries = {path: _entry(path, arrays, digests, static) for path, static in tensors.items()}
    return PartEntry(entries, _save(folder, name, arrays))


def _save(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, FileEntry]:
    stored = {path: array for path, array in arrays.items() if array.size}
    if not stored:  # Orbax refuses arrays of size zero; the manifest holds all there is
        return {}
    overhead = _PART_OVERHEAD + _ARRAY_OVERHEAD * len(stored)
    fs.check_room(folder.parent, sum(array.nbytes for array in stored.values()) + overhead)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        orbax_io.save_tree(folder, nest(stored))
        fs.sync_tree(folder)
        return other_files(folder, stored)
    except Exception as error:  # Orbax wraps the system's errors in types of its own
        reason = str(error).partition("\n")[0]
        raise OutputError(f"{folder}: part {name!r} cannot be written: {reason}") from error


def _add_leaf(path: str, leaf: Any, arrays: dict[str, np.ndarray]) -> QTensor | None:
    """Fetch a leaf's arrays to the host; returns the QTensor, whose static fields are needed."""
    if not isinstance(leaf, QTensor):
        arrays[path] = _host_array(path, leaf)
        return None
    for field in _FIELDS:
        value = getattr(leaf, field)
        if value is not None:
            arrays[f"{path}/{field}"] = _host_array(f"{path}/{field}", value)
    return leaf


def _host_array(path: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array):
        if isinstance(leaf, Tracer):
            raise CheckpointError(f"{path}: is traced by JAX; write checkpoints outside of jit")
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            raise CheckpointError(
                f"{path}: lies on the devices of several processes; gather it first "
                "(jax.experimental.multihost_utils.process_allgather)"
            )
    elif not isinstance(leaf, (np.ndarray, np.generic)):
        raise CheckpointError(f"{path}: is a {type(leaf).__name__}, neither an array nor a QTensor")
    array = little_endian(np.asarray(leaf))
    if array.dtype.name not in fmt.DTYPES:
        raise CheckpointError(
            f"{path}: is {array.dtype.name}, and checkpoints hold {', '.join(fmt.DTYPES)}: cast it"
        )
    return array


def _leaves(parent: str, key: Any, node: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs in order, with every key checked on the way."""
    if not isinstance(key, str) or not fmt.safe_name(key):
        raise CheckpointError(
            f"key {key!r} under {parent or 'the root'!r}: keys of a checkpoint are letters, digits "
            "and _ . + -, and do not start with a sign: rename it"
        )
    path = f"{parent}/{key}" if parent else key
    if not isinstance(node, Mapping):
        yield path, node
    elif node:
        for name, item in node.items():
            yield from _leaves(path, name, item)
    else:
        raise CheckpointError(f"{path}: an empty dict would be lost: leave it out")


def _check_stored_names(paths: Iterable[str]) -> None:
    owners: dict[str, str] = {}
    for path in paths:
        folder = fmt.stored_name(path)
        if owners.setdefault(folder, path) != path:
            raise CheckpointError(
                f"{path} and {owners[folder]} would share a folder: rename one of them"
            )
        if len(folder) > 255:
            raise CheckpointError(f"{path}: longer than the 255 bytes of a file name: shorten it")


def _entry(
    path: str, arrays: Mapping[str, np.ndarray], digests: Mapping[str, str], w: QTensor | None
) -> ArrayEntry | QTensorEntry:
    if w is None:
        return ArrayEntry(arrays[path].dtype.name, arrays[path].shape, digests[path])
    fields = {
        field: _entry(f"{path}/{field}", arrays, digests, None)
        for field in _FIELDS
        if f"{path}/{field}" in arrays
    }
    entry = QTensorEntry(w.spec, w.k, w.n, fields)  # pyright: ignore[reportArgumentType]
    fmt.check_qtensor(path, entry)
    return entry
