"""Reading and writing single safetensors files as NumPy arrays, bfloat16 and float8 included.

A file is 8 bytes of header length (little endian), a JSON header of name -> dtype, shape and data
offsets, and the tensors' bytes in C order without gaps.  The reader maps the file and gives views;
everything the header claims is checked against the file before the first view.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jq.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor; `begin` and `end` are file offsets in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A checked, memory-mapped file: `tensors` describes, `read` gives read-only views.

    Raises:
        CheckpointError: the file is truncated, padded, or its header is malformed, has duplicate
            names, unknown dtypes, overlaps or holes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors = _read_header(self.path)
        self._bytes = np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else None

    def read(self, name: str) -> np.ndarray:
        """A read-only view into the file; nothing is copied."""
        info = self.tensors[name]
        if info.begin == info.end or self._bytes is None:
            return np.zeros(info.shape, info.dtype)
        return self._bytes[info.begin : info.end].view(info.dtype).reshape(info.shape)

    def release(self) -> None:
        """Give the memory of what was read back; views stay valid, and read the file again.

        Mapped pages count as the process's own until the system needs the room, which containers
        with a memory limit do not always wait for.
        """
        mapped = None if self._bytes is None else getattr(self._bytes, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays of any layout and byte order; the file appears complete or not at all.

    Raises:
        CheckpointError: an array's dtype has no name in the format.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, array in tensors.items():
        dtype = array.dtype.newbyteorder("=")
        if dtype not in _CODES:
            raise CheckpointError(f"{name}: dtype {array.dtype} cannot be stored in safetensors")
        size = prod(array.shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_json_strictly(text: bytes | str, source: Path) -> Any:
    """Parse JSON; CheckpointError on duplicate keys too, which the json module lets pass."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise CheckpointError(f"{source}: duplicate key {name!r}")
            seen[name] = value
        return seen

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from error


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated: the header claims {length} bytes, "
                f"the file has {size}"
            )
        header = load_json_strictly(file.read(length), path)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _info(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: the header entry needs dtype, shape and data_offsets")
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype {entry['dtype']!r} is unknown; known: {', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{where}: malformed shape {shape!r} or data_offsets {offsets!r}")
    dtype = DTYPES[entry["dtype"]]
    expected = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{where}: shape {shape} of {entry['dtype']} needs {expected} bytes, the offsets "
            f"{offsets} give {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            kind = "overlaps the one before" if info.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {name!r} {kind}: it begins at byte {info.begin}, "
                f"expected {position}"
            )
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{path}: truncated or padded: expected {position} bytes, the file has {size}; "
            "download or copy it again"
        )
