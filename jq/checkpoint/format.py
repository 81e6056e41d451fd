"""What a checkpoint folder holds, as data: names, entries and the layout of a stored QTensor.

    config.json, tokenizer.json, ...   the model's own files, copied as they are
    jaxq.json                          the manifest (see `Manifest`), written last
    report.json                        optional, what the caller measured per layer
    params/<part>/                     one Orbax checkpoint per top-level key of the parameters

Inside a part every array is an uncompressed Zarr v2 array, so a file of data is exactly the
little-endian C-order bytes of its chunk, and `sha256sum` prints the digest of the manifest. Arrays
in several chunks have a digest for each, and are read in parts by those who need no more:

* What several processes wrote together has a chunk for each of its shards (format version 2).
* Of what one process wrote, arrays of 512 KiB and more are stored in 8, 4 or 2 pieces along the
  axis that tensor parallelism cuts (version 3). That axis is stored as two, [.., pieces, size /
  pieces, ..], with a chunk for each piece.

All else is one chunk, with one digest; a checkpoint of nothing else is of version 1. Pieces cost
files: a Llama of 8 billion weights with int4 linears, in groups of 128 with zero points, has 739
arrays in 2,993 files of data (one of 70 billion, 1,843 in 10,257), beside the small file that Orbax
writes for every array. What stays whole is 0.9% (0.2%) of the bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq.errors import CheckpointError, SpecError
from jq.packing import LAYOUT_VERSION, packed_size
from jq.spec import QuantSpec

FORMAT = "jaxq"
FORMAT_VERSION = 3
MANIFEST = "jaxq.json"
REPORT = "report.json"
PARAMS = "params"
# In folders that are written for other tools: digests of their tensors, where they came from.
EXPORT_MANIFEST = "jaxq_export.json"
CONFIG_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# What JAX holds without x64, and Zarr stores bit for bit.
DTYPES = (
    *("bfloat16", "float16", "float32", "float8_e4m3fn"),
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "bool"),
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """One stored array.

    sha256: of its little-endian C-order bytes, in hex; where there are chunks, of their digests,
      one after the other.
    chunk_shape: of arrays that are cut into equal chunks; () for the others.
    chunks: the digest of each chunk's bytes, in C order of the grid.
    split: the axis that is stored as two, [.., chunks, size / chunks, ..]; None for no such one.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    chunk_shape: tuple[int, ...] = ()
    chunks: tuple[str, ...] = ()
    split: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(jnp.dtype(self.dtype)).itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(n // c for n, c in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the array has in Orbax."""
        if (at := self.split) is None:
            return self.shape
        return (*self.shape[:at], len(self.chunks), self.chunk_shape[at], *self.shape[at + 1 :])

    @property
    def chunk_files(self) -> tuple[str, ...]:
        """The names of the chunks' files, in the order of `chunks`."""
        if (at := self.split) is None:
            return tuple(".".join(map(str, place)) for place in np.ndindex(self.grid))
        after = ("0",) * (len(self.shape) - at)
        return tuple(".".join((*("0",) * at, str(i), *after)) for i in range(len(self.chunks)))


@dataclasses.dataclass(frozen=True)
class QTensorEntry:
    """A stored QTensor: its static fields, and the arrays it has (None fields are left out)."""

    spec: QuantSpec
    k: int
    n: int
    fields: Mapping[str, ArrayEntry]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., K, N]."""
        return (*self.fields["codes"].shape[:-2], self.k, self.n)


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 in hex of a file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class PartEntry:
    """One part.  tensors: by full path ("layers_0/mlp/up_proj/kernel"); files: what Orbax wrote
    beside the array data, by name relative to the part's folder."""

    tensors: Mapping[str, ArrayEntry | QTensorEntry]
    files: Mapping[str, FileEntry]

    def arrays(self) -> Iterator[tuple[str, ArrayEntry]]:
        """(path, entry) of every array; the fields of a QTensor stand under its path."""
        for path, entry in self.tensors.items():
            if isinstance(entry, ArrayEntry):
                yield path, entry
            else:
                yield from ((f"{path}/{name}", field) for name, field in entry.fields.items())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of jaxq.json.

    parts: by top-level key of the parameter tree, in the order they were written.
    meta: what the caller recorded (recipe, calibration, ...).
    versions: of the libraries that wrote the checkpoint.
    files: the copied files, by name.
    """

    parts: Mapping[str, PartEntry]
    meta: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    packing_layout: int = LAYOUT_VERSION

    @property
    def format_version(self) -> int:
        """The lowest that can tell all of it."""
        entries = [entry for part in self.parts.values() for _, entry in part.arrays()]
        if any(entry.split is not None for entry in entries):
            return 3
        return 2 if any(entry.chunks for entry in entries) else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for part in self.parts.values() for _, entry in part.arrays())


def safe_name(name: str) -> bool:
    """Whether a string may be a key of the parameter tree and part of a file name."""
    return _NAME.fullmatch(name) is not None


def stored_name(path: str) -> str:
    """The folder that Orbax gives to the array at a path."""
    return path.replace("/", ".")


def qtensor_layout(
    spec: QuantSpec, k: int, n: int, lead: tuple[int, ...], *, ordered: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array of a QTensor `[*lead, k, n]`, by field.

    Raises SpecError when group_size does not divide the tensor.
    """
    rows, columns = spec.scale_shape(k, n)
    if spec.is_float:
        codes = ("float8_e4m3fn", (*lead, k, n))
    elif spec.bits == 8 and spec.symmetric:
        codes = ("int8", (*lead, k, n))
    else:
        codes = ("uint8", (*lead, packed_size(k, spec.bits), n))
    layout = {"codes": codes, "scale": (str(spec.scale_dtype), (*lead, rows, columns))}
    if spec.has_zero_point:
        layout["zero_point"] = ("uint8", (*lead, rows, packed_size(columns, spec.bits)))
    if ordered:
        layout["order"] = ("int32", (*lead, k))
    if spec.activation is not None and spec.activation.static:
        layout["input_scale"] = ("float32", lead)
    return layout


def check_qtensor(path: str, entry: QTensorEntry) -> None:
    """Raise CheckpointError, with both values, unless the arrays are those the spec asks for."""
    shape = entry.fields["codes"].shape if "codes" in entry.fields else ()
    if len(shape) < 2:
        raise CheckpointError(f"{path}: a quantized tensor needs codes [..., K, N], got {shape}")
    ordered = "order" in entry.fields
    try:
        wanted = qtensor_layout(entry.spec, entry.k, entry.n, shape[:-2], ordered=ordered)
    except SpecError as error:
        raise CheckpointError(
            f"{path}: [{entry.k}, {entry.n}] does not fit its spec: {error}"
        ) from error
    if wanted.keys() != entry.fields.keys():
        raise CheckpointError(
            f"{path}: {entry.spec} needs the arrays {', '.join(sorted(wanted))}, "
            f"but there are {', '.join(sorted(entry.fields))}"
        )
    for name, (dtype, size) in wanted.items():
        field = entry.fields[name]
        if (field.dtype, field.shape) != (dtype, size):
            raise CheckpointError(
                f"{path}: {name} is {field.dtype}{list(field.shape)}, but {entry.spec} of "
                f"[{entry.k}, {entry.n}] needs {dtype}{list(size)}"
            )
