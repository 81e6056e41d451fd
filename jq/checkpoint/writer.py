"""Write a checkpoint, part by part."""

from __future__ import annotations

import contextlib
import dataclasses
import os
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
from jq.checkpoint.digests import array_digest, bytes_entry, in_threads, little_endian
from jq.checkpoint.format import ArrayEntry, FileEntry, Manifest, PartEntry, QTensorEntry
from jq.checkpoint.manifest import encode_json, library_versions, manifest_json
from jq.checkpoint.parts import nest, other_files
from jq.errors import CheckpointError, ModelError, OutputError
from jq.qtensor import QTensor

_FIELDS = tuple(f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static"))
# Room for Orbax's small files: per part, and per array.
_PART_OVERHEAD, _ARRAY_OVERHEAD = 32_768, 8_192


class CheckpointWriter:
    """Build a checkpoint folder that appears complete or not at all.

        with CheckpointWriter(path, config_files_from=model_folder) as writer:
            writer.write_part("embed", params["embed"])
            ...
            writer.finish({"recipe": ...})

    Parts may be written as they are finished; host memory holds one at a time. Until `finish`
    everything stands in a hidden sibling folder, which any exception removes; what a killed process
    left is removed by the next writer. Equal parameters, files and meta give equal bytes in every
    file.

    Args:
      path: the folder to make; parents are made where missing.
      config_files_from: a model folder whose config, generation and tokenizer files are copied as
        they are (`jq.checkpoint.format.CONFIG_FILES`; config.json must be there).
      files: further files to put beside them, by plain name; they win over copied ones.
      overwrite: replace an existing folder that jaxq has made (anything else is never replaced).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config_files_from: str | os.PathLike[str] | None = None,
        files: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self._copies = _collect(config_files_from, files or {})
        self._overwrite = overwrite
        self._parts: dict[str, PartEntry] = {}
        self._scope = contextlib.ExitStack()
        self._partial: Path | None = None
        self._finished = False

    def __enter__(self) -> CheckpointWriter:
        """Take the folder's lock and clear away what dead processes left.

        Raises OutputError: the folder is not empty, not writable, or being written by another;
        CheckpointError in a program of several processes.
        """
        if self._partial is not None or self._finished:
            raise CheckpointError(f"{self.path}: a CheckpointWriter is for one use")
        if jax.process_count() > 1:
            # Orbax would wait for all processes, pids name our folders, and only one may rename.
            raise CheckpointError(
                f"{self.path}: checkpoints are written by programs of one process; this one is "
                f"{jax.process_index()} of {jax.process_count()}. Gather the arrays and save them "
                "outside of jax.distributed"
            )
        self.path = Path(os.path.realpath(self.path))
        with self._scope as scope:
            partial = scope.enter_context(fs.building(self.path, overwrite=self._overwrite))
            with fs.output_errors(partial):
                (partial / fmt.PARAMS).mkdir()
            self._partial = partial
            self._scope = scope.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._scope.close()
        if kind is None and not self._finished:
            raise CheckpointError(
                f"{self.path}: the writer was left without finish(); nothing was kept"
            )

    def write_part(self, name: str, subtree: Any) -> None:
        """Write one top-level entry of the parameter tree.

        Args:
          name: the key, for instance "layers_0".
          subtree: nested dicts of arrays and QTensors, or one of those.
        Raises:
          CheckpointError: a leaf that is no array, a dtype that would not survive, a QTensor whose
            arrays do not follow from its spec, a name that is no plain file name.
          OutputError: no room, or the disk refuses.
        """
        partial = self._open()
        if name in self._parts:
            raise CheckpointError(f"part {name!r} was written already")
        arrays: dict[str, np.ndarray] = {}
        tensors: dict[str, QTensor | None] = {}
        for path, leaf in _leaves("", name, subtree):
            tensors[path] = _add_leaf(path, leaf, arrays)
        _check_stored_names(arrays)
        digests = dict(zip(arrays, in_threads(array_digest, arrays.values()), strict=True))
        entries = {path: _entry(path, arrays, digests, static) for path, static in tensors.items()}
        self._parts[name] = PartEntry(entries, self._save(partial, name, arrays))

    def finish(
        self, meta: Mapping[str, Any] | None = None, report: Mapping[str, Any] | None = None
    ) -> None:
        """Write report and manifest, and make the folder visible.

        Args:
          meta: facts for the manifest: recipe, calibration, ... (see `encode_json`).
          report: what was measured per layer, for report.json.
        Raises: CheckpointError when either has no JSON form; OutputError when the disk refuses.
        """
        partial = self._open()
        small = dict(self._copies)
        if report is not None:
            small[fmt.REPORT] = encode_json(report, fmt.REPORT)
        manifest = Manifest(
            parts=self._parts,
            meta=dict(meta or {}),
            versions=library_versions(),
            files={name: bytes_entry(data) for name, data in small.items()},
        )
        small[fmt.MANIFEST] = manifest_json(manifest)  # the last of the files
        fs.check_room(partial, sum(map(len, small.values())))
        with fs.output_errors(partial):
            for name, data in small.items():
                (partial / name).write_bytes(data)
        # Somebody may have put something there in the meantime.
        fs.check_target(self.path, overwrite=self._overwrite)
        fs.publish(partial, self.path)
        self._finished = True
        self._partial = None

    def _open(self) -> Path:
        if self._partial is None:
            state = "is finished" if self._finished else "was not entered (use `with`)"
            raise CheckpointError(f"{self.path}: this CheckpointWriter {state}")
        return self._partial

    def _save(
        self, partial: Path, name: str, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, FileEntry]:
        stored = {path: array for path, array in arrays.items() if array.size}
        if not stored:  # Orbax refuses arrays of size zero; the manifest holds all there is
            return {}
        folder = partial / fmt.PARAMS / name
        overhead = _PART_OVERHEAD + _ARRAY_OVERHEAD * len(stored)
        fs.check_room(partial, sum(array.nbytes for array in stored.values()) + overhead)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            orbax_io.save_tree(folder, nest(stored))
            fs.sync_tree(folder)
            return other_files(folder, stored)
        except Exception as error:  # Orbax wraps the system's errors in types of its own
            reason = str(error).partition("\n")[0]
            raise OutputError(f"{self.path}: part {name!r} cannot be written: {reason}") from error


def _collect(folder: Any, files: Mapping[str, bytes]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if folder is not None:
        present = [name for name in fmt.CONFIG_FILES if Path(folder, name).is_file()]
        if "config.json" not in present:
            raise ModelError(f"{folder}: no config.json: not a model folder")
        found = {name: Path(folder, name).read_bytes() for name in present}
    for name in files:
        if not fmt.safe_name(name) or name in (fmt.MANIFEST, fmt.REPORT, fmt.PARAMS):
            raise CheckpointError(f"{name!r} is no name for a file beside the manifest")
    return found | dict(files)


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
