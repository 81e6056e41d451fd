"""SHA-256 of arrays and files.

Orbax stores no digest of array data: most flipped bits load without a word.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jq.checkpoint.format import FileEntry

_WORKERS = min(8, os.cpu_count() or 1)
_COPIED = 1 << 20  # bytes


def little_endian(array: np.ndarray) -> np.ndarray:
    """The same values, C-contiguous and little-endian (without a copy where they are already)."""
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not np.little_endian):
        array = array.astype(array.dtype.newbyteorder("<"))
    # ascontiguousarray would make a vector of a scalar.
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def array_digest(array: np.ndarray) -> str:
    """Hex digest of the little-endian C-order bytes; of views, a few rows at a time are copied."""
    digest = hashlib.sha256()
    for piece in _rows(array):
        digest.update(little_endian(piece).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _rows(array: np.ndarray) -> Iterator[np.ndarray]:
    if array.flags.c_contiguous or array.ndim < 2:
        yield array
        return
    step = max(1, _COPIED * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def joint_digest(digests: Iterable[str]) -> str:
    """Hex digest of the digests of an array's chunks, in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def bytes_entry(data: bytes) -> FileEntry:
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def file_entry(path: Path) -> FileEntry:
    """Size and digest of a file that fits into memory."""
    return bytes_entry(path.read_bytes())


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`[function(item) for item in items]`; hashing and fsync run outside of the GIL."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(function, items))
