"""The folder of one part on disk: which files it must hold, and how large each is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jq.checkpoint.digests import file_entry
from jq.checkpoint.format import ArrayEntry, FileEntry, PartEntry, stored_name
from jq.checkpoint.orbax_io import STATE
from jq.errors import CheckpointError

_CHUNK = re.compile(r"\d+(\.\d+)*")  # how Zarr v2 names chunks; a scalar's is "0"


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, key = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = leaf
    return root


def other_files(folder: Path, arrays: Iterable[str]) -> dict[str, FileEntry]:
    """What Orbax wrote into a part's folder beside the data of the arrays at these paths."""
    data = {_array_folder(folder, path) for path in arrays}
    return {
        path.relative_to(folder).as_posix(): file_entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not (path.parent in data and _CHUNK.fullmatch(path.name))
    }


def check_part(folder: Path, part: PartEntry, *, verify: bool) -> None:
    """Compare a part's files with the manifest before anything is read from them.

    Since the data is not compressed, its size follows from shape and dtype: what is too short, too
    long or too large for its claim is refused before memory is taken for it.

    Raises CheckpointError naming the tensor or the file, with both sizes; a link is never followed.
    """
    stored = [(path, entry) for path, entry in part.arrays() if entry.nbytes]
    if not stored:
        return
    if not folder.is_dir() or folder.is_symlink():
        raise CheckpointError(f"{folder} is missing: the checkpoint is incomplete; copy it again")
    for link in _links(folder):
        raise CheckpointError(
            f"{link} is a symbolic link, and a checkpoint is read from plain files only: "
            "copy it with its links resolved (cp -rL)"
        )
    for name, entry in part.files.items():
        _check_file(folder / name, entry, verify=verify)
    for path, entry in stored:
        check = _check_chunks if entry.chunks else _check_size
        check(path, _array_folder(folder, path), entry)


def _array_folder(folder: Path, path: str) -> Path:
    return folder / STATE / stored_name(path)


def _links(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink())


def _check_file(path: Path, entry: FileEntry, *, verify: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; copy it again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise CheckpointError(
            f"{path} holds {size} bytes instead of {entry.bytes}: it is damaged; copy it again"
        )
    if verify and (found := file_entry(path).sha256) != entry.sha256:
        raise CheckpointError(
            f"{path}: sha256 is {found}, but the manifest says {entry.sha256}: it is damaged or "
            "was changed; copy it again"
        )


def _check_size(path: str, folder: Path, entry: ArrayEntry) -> None:
    size = sum(_chunk_sizes(path, folder).values())
    if size != entry.nbytes:
        raise CheckpointError(
            f"{path}: {folder} holds {size} bytes of data instead of {entry.nbytes}: "
            "cut short or damaged; copy it again"
        )


def _check_chunks(path: str, folder: Path, entry: ArrayEntry) -> None:
    found, wanted = _chunk_sizes(path, folder), set(entry.chunk_files)
    for name in sorted(wanted - found.keys()):
        raise CheckpointError(
            f"{path}: {folder / name} is missing: the checkpoint is incomplete; copy it again"
        )
    for name in sorted(found.keys() - wanted):
        raise CheckpointError(
            f"{path}: {folder / name} is none of its {len(wanted)} chunks: the checkpoint was "
            "tampered with or damaged; copy it again"
        )
    nbytes = entry.nbytes // len(wanted)
    for name, size in found.items():
        if size != nbytes:
            raise CheckpointError(
                f"{path}: {folder / name} holds {size} bytes instead of {nbytes}: "
                "cut short or damaged; copy it again"
            )


def _chunk_sizes(path: str, folder: Path) -> dict[str, int]:
    files = (file for file in folder.glob("*") if _CHUNK.fullmatch(file.name) and file.is_file())
    sizes = {file.name: file.stat().st_size for file in files}
    if not sizes:
        raise CheckpointError(
            f"{path}: there is no data in {folder}: the checkpoint is incomplete; copy it again"
        )
    return sizes
