"""Write one part of a checkpoint: one top-level entry of the parameter tree.

In a program of several processes all of them write it, each what it holds (`jq.checkpoint.shards`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jq.checkpoint import files as fs
from jq.checkpoint import format as fmt
from jq.checkpoint import orbax_io, splits
from jq.checkpoint.digests import array_digest, in_threads, joint_digest, little_endian
from jq.checkpoint.format import ArrayEntry, FileEntry, PartEntry, QTensorEntry
from jq.checkpoint.parts import nest, other_files
from jq.checkpoint.shards import ShardedArray, sharded
from jq.checkpoint.splits import SplitArray
from jq.cuts import CutRule
from jq.distributed import Team
from jq.errors import CheckpointError, OutputError
from jq.qtensor import QTensor

_FIELDS = tuple(f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static"))
# Room for Orbax's small files, per part and per array, and for the last block of each piece.
_PART_OVERHEAD, _ARRAY_OVERHEAD, _FILE_OVERHEAD = 32_768, 8_192, 4_096


def save_part(
    folder: Path,
    name: str,
    subtree: Any,
    team: Team | None = None,
    cuts: CutRule | None = None,
) -> PartEntry:
    """Write a part into a folder, which is made or replaced, and sync it to the disk.

    Args:
      folder: its parent exists; all processes see the same one.
      name: the part's key in the parameter tree.
      subtree: nested dicts of arrays and QTensors, or one of those.
      team: the program's processes, all of which are here, with the same tree.
      cuts: along which axes large arrays are stored in pieces where one process writes alone (see
        `jq.checkpoint.splits`); None: they stay whole.
    Returns: what the manifest holds of it, the same in every process.
    Raises: see `CheckpointWriter.write_part`.
    """
    team = team or Team(index=0, count=1)
    arrays: dict[str, Stored] = {}
    tensors: dict[str, QTensor | None] = {}
    cuts = cuts if team.count == 1 else None  # the shards of several processes are their pieces

    def fetch() -> list[Any]:
        for path, leaf in _leaves("", name, subtree):
            plan = {} if cuts is None else splits.plan(path, leaf, cuts)
            tensors[path] = _add_leaf(path, leaf, arrays, team, plan)
        _check_stored_names(arrays)
        _check_room(folder, arrays)
        digests = in_threads(_digest, arrays.values())
        # A leftover of a run that was stopped; nobody writes before all have been here.
        if team.leads:
            shutil.rmtree(folder, ignore_errors=True)
        return [orbax_io.operations() if team.count > 1 else 0, digests]

    told = team.attempt(f"part {name!r} is ready", fetch)
    if team.count > 1:
        orbax_io.catch_up(max(count for count, _ in told))
    found = _merged(arrays, [digests for _, digests in told])
    entries = {path: _entry(path, found, static) for path, static in tensors.items()}
    return PartEntry(entries, _save(folder, name, arrays, team))


Stored = np.ndarray | ShardedArray | SplitArray


def _check_room(folder: Path, arrays: Mapping[str, Stored]) -> None:
    stored = [_data(array) for array in arrays.values()]
    needed = sum(array.nbytes for array in stored)
    files = sum(len(array.chunks) for array in arrays.values() if isinstance(array, SplitArray))
    overhead = _PART_OVERHEAD + _ARRAY_OVERHEAD * len(stored) + _FILE_OVERHEAD * files
    if needed:
        fs.check_room(folder.parent, needed + overhead)


def _save(
    folder: Path, name: str, arrays: Mapping[str, Stored], team: Team
) -> dict[str, FileEntry]:
    stored = {path: _data(array) for path, array in arrays.items() if _data(array).size}
    if not stored:  # Orbax refuses arrays of size zero; the manifest holds all there is
        return {}
    axes = {path: array.axis for path, array in arrays.items() if isinstance(array, SplitArray)}
    with _orbax_errors(folder, name, team):
        orbax_io.save_tree(folder, nest(stored), axes, jointly=team.count > 1)

    def finish() -> dict[str, Any]:
        with _orbax_errors(folder, name, team):
            orbax_io.forget_time_and_place(folder)
            fs.sync_tree(folder)
            found = other_files(folder, stored)
        return {file: dataclasses.asdict(entry) for file, entry in found.items()}

    files = team.lead(f"part {name!r} is written", finish)
    return {file: FileEntry(**entry) for file, entry in files.items()}


@contextlib.contextmanager
def _orbax_errors(folder: Path, name: str, team: Team) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax wraps the system's errors in types of its own
        if team.count > 1 and (failure := team.failure(wait=1.0)) is not None:
            raise failure from error
        reason = str(error).partition("\n")[0]
        raise OutputError(f"{folder}: part {name!r} cannot be written: {reason}") from error


def _add_leaf(
    path: str,
    leaf: Any,
    arrays: dict[str, Stored],
    team: Team,
    plan: Mapping[str, tuple[int, int]],
) -> QTensor | None:
    """Fetch a leaf's arrays to the host; returns the QTensor, whose static fields are needed."""
    if not isinstance(leaf, QTensor):
        arrays[path] = _stored(path, leaf, team, plan)
        return None
    for field in _FIELDS:
        value = getattr(leaf, field)
        if value is not None:
            arrays[f"{path}/{field}"] = _stored(f"{path}/{field}", value, team, plan)
    return leaf


def _stored(path: str, leaf: Any, team: Team, plan: Mapping[str, tuple[int, int]]) -> Stored:
    if isinstance(leaf, jax.Array):
        if isinstance(leaf, Tracer):
            raise CheckpointError(f"{path}: is traced by JAX; write checkpoints outside of jit")
        if team.count == 1 and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            raise CheckpointError(
                f"{path}: lies on the devices of several processes; gather it first "
                "(jax.experimental.multihost_utils.process_allgather)"
            )
    elif not isinstance(leaf, (np.ndarray, np.generic)):
        raise CheckpointError(f"{path}: is a {type(leaf).__name__}, neither an array nor a QTensor")
    if not isinstance(leaf, jax.Array):
        leaf = little_endian(np.asarray(leaf))
    if leaf.dtype.name not in fmt.DTYPES:
        raise CheckpointError(
            f"{path}: is {leaf.dtype.name}, and checkpoints hold {', '.join(fmt.DTYPES)}: cast it"
        )
    cut = sharded(path, leaf) if team.count > 1 else None
    if cut is not None:
        return cut
    whole = little_endian(np.asarray(leaf))
    return splits.split(whole, *plan[path]) if path in plan else whole


def _data(array: Stored) -> Any:
    return array if isinstance(array, np.ndarray) else array.array


def _digest(array: Stored) -> str | dict[str, str]:
    """The digest of an array, or those of this process's chunks by their number."""
    if isinstance(array, ShardedArray):
        return {str(number): digest for number, digest in array.digests.items()}
    if isinstance(array, SplitArray):
        return {str(number): array_digest(chunk) for number, chunk in enumerate(array.chunks)}
    return array_digest(array)


def _merged(arrays: Mapping[str, Stored], told: Sequence[Sequence[Any]]) -> dict[str, ArrayEntry]:
    """The entry of every array, from the digests that each process has told."""
    entries = {}
    for (path, array), digests in zip(arrays.items(), zip(*told, strict=True), strict=True):
        dtype, shape = _data(array).dtype.name, tuple(array.shape)
        if not isinstance(array, np.ndarray):
            chunks = {int(number): d for some in digests for number, d in some.items()}
            count = math.prod(shape) // math.prod(array.chunk_shape)
            ordered = tuple(chunks[number] for number in range(count))
            axis = array.axis if isinstance(array, SplitArray) else None
            joint = joint_digest(ordered)
            entries[path] = ArrayEntry(dtype, shape, joint, array.chunk_shape, ordered, axis)
            continue
        if len(set(digests)) > 1:
            other = next(i for i, digest in enumerate(digests) if digest != digests[0])
            raise CheckpointError(f"{path}: is not the same in process 0 and in process {other}")
        entries[path] = ArrayEntry(dtype, shape, digests[0])
    return entries


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
    path: str, found: Mapping[str, ArrayEntry], w: QTensor | None
) -> ArrayEntry | QTensorEntry:
    if w is None:
        return found[path]
    fields = {field: found[f"{path}/{field}"] for field in _FIELDS if f"{path}/{field}" in found}
    entry = QTensorEntry(w.spec, w.k, w.n, fields)  # pyright: ignore[reportArgumentType]
    fmt.check_qtensor(path, entry)
    return entry
