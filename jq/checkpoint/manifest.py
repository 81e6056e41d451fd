"""jaxq.json: written with fixed order and layout, read with distrust."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq import spec as spec_module
from jq.checkpoint import format as fmt
from jq.checkpoint.digests import joint_digest
from jq.checkpoint.format import ArrayEntry, FileEntry, Manifest, PartEntry, QTensorEntry
from jq.errors import CheckpointError, SpecError
from jq.packing import LAYOUT_VERSION
from jq.spec import ActivationSpec, QuantSpec

_MAX_BYTES = 1 << 28
_LIBRARIES = ("jaxq", "jax", "jaxlib", "numpy", "orbax-checkpoint", "tensorstore")
_HEX = frozenset("0123456789abcdef")
_CHOICES = {
    "granularity": {
        QuantSpec: typing.get_args(spec_module.WeightGranularity),
        ActivationSpec: typing.get_args(spec_module.ActivationGranularity),
    },
    "scale_dtype": {QuantSpec: typing.get_args(spec_module.ScaleDtype)},
}
_TYPES = {"group_size": int, "symmetric": bool, "static": bool}


def library_versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint; a library that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def encode_json(value: Any, what: str) -> bytes:
    """Indented UTF-8 JSON.

    NumPy scalars become numbers, tuples lists, paths strings; NaN and infinity become null, for
    which JSON has no number.  Raises CheckpointError, naming the place, for anything else.
    """
    text = json.dumps(_plain(value, what), indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _plain(value: Any, where: str) -> Any:
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case np.generic():
            return _plain(value.item(), where)
        case Path():
            return str(value)
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise CheckpointError(f"{where}: JSON keys are strings, not {key!r}")
            return {str(key): _plain(item, f"{where}/{key}") for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}/{i}") for i, item in enumerate(value)]
    raise CheckpointError(
        f"{where}: a {type(value).__name__} has no JSON form; use numbers, strings, lists and dicts"
    )


def manifest_json(manifest: Manifest) -> bytes:
    """The bytes of jaxq.json."""
    node = {
        "format": fmt.FORMAT,
        "format_version": manifest.format_version,
        "packing_layout": manifest.packing_layout,
        "versions": manifest.versions,
        "meta": manifest.meta,
        "files": _files_json(manifest.files),
        "parts": {name: part_json(part) for name, part in manifest.parts.items()},
    }
    return encode_json(node, fmt.MANIFEST)


def part_json(part: PartEntry) -> dict[str, Any]:
    """A part as JSON values."""
    tensors = {}
    for path, entry in part.tensors.items():
        if isinstance(entry, ArrayEntry):
            tensors[path] = {"kind": "array", **_array_json(entry)}
            continue
        fields = {name: _array_json(field) for name, field in entry.fields.items()}
        spec = dataclasses.asdict(entry.spec)
        tensors[path] = {"kind": "qtensor", "spec": spec, "k": entry.k, "n": entry.n}
        tensors[path]["fields"] = fields
    return {"tensors": tensors, "files": _files_json(part.files)}


def _array_json(entry: ArrayEntry) -> dict[str, Any]:
    node = dataclasses.asdict(entry)
    if not entry.chunks:
        del node["chunk_shape"], node["chunks"]
    if entry.split is None:
        del node["split"]
    return node


def _files_json(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {name: dataclasses.asdict(entry) for name, entry in files.items()}


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The inverse of `manifest_json`; every field is checked.

    Args:
      data: the contents of the file.
      where: its name in error messages.
    Raises: CheckpointError naming the entry and what is wrong with it: not JSON, repeated keys,
      another format or a newer version, missing or unknown fields, unsafe names, shapes or dtypes
      that do not follow from the spec.
    """
    node = _decode(data, where)
    if node.get("format") != fmt.FORMAT:
        raise CheckpointError(
            f"{where}: format is {node.get('format')!r}, not {fmt.FORMAT!r}: no jaxq checkpoint"
        )
    version = _field(node, "format_version", int, where)
    if not 1 <= version <= fmt.FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version}, and this jaxq reads versions 1 to "
            f"{fmt.FORMAT_VERSION}: install the jaxq that wrote it, or a newer one"
        )
    layout = _field(node, "packing_layout", int, where)
    if layout != LAYOUT_VERSION:
        raise CheckpointError(
            f"{where}: packing_layout is {layout}, and this jaxq reads layout {LAYOUT_VERSION}: "
            "install the jaxq that wrote it, or a newer one"
        )
    parts = _field(node, "parts", dict, where)
    return Manifest(
        parts={name: parse_part(name, part, where) for name, part in parts.items()},
        meta=_field(node, "meta", dict, where),
        versions=_field(node, "versions", dict, where),
        files=_parse_files(_field(node, "files", dict, where), f"{where}: files", folders=False),
        packing_layout=layout,
    )


def _decode(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{where}: {len(data)} bytes, more than the {_MAX_BYTES} allowed")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        node = dict(pairs)
        if len(node) != len(pairs):
            keys = [key for key, _ in pairs]
            raise CheckpointError(
                f"{where}: key {next(k for k in keys if keys.count(k) > 1)!r} stands there twice"
            )
        return node

    try:
        node = json.loads(data.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}): damaged or cut short") from error
    if not isinstance(node, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(node).__name__}, not an object")
    return node


def parse_part(name: str, node: Any, where: str) -> PartEntry:
    """The inverse of `part_json`, as careful as `parse_manifest`."""
    place = f"{where}: part {name!r}"
    if not fmt.safe_name(name):
        raise CheckpointError(f"{place}: the name is not a plain file name")
    node = _mapping(node, place)
    tensors = {
        path: _parse_tensor(path, entry, name, place)
        for path, entry in _field(node, "tensors", dict, place).items()
    }
    files = _parse_files(_field(node, "files", dict, place), f"{place}: files", folders=True)
    _only(node, ("tensors", "files"), place)
    return PartEntry(tensors, files)


def _parse_tensor(path: str, node: Any, part: str, where: str) -> ArrayEntry | QTensorEntry:
    keys = path.split("/")
    if keys[0] != part or not all(fmt.safe_name(key) for key in keys):
        raise CheckpointError(
            f"{where}: tensor path {path!r} is not made of plain names under {part!r}"
        )
    node = dict(_mapping(node, path))
    kind = node.pop("kind", None)
    if kind == "array":
        return _parse_array(path, node)
    if kind != "qtensor":
        raise CheckpointError(f"{path}: kind is {kind!r}, not 'array' or 'qtensor'")
    _only(node, ("spec", "k", "n", "fields"), path)
    fields = _field(node, "fields", dict, path)
    entry = QTensorEntry(
        spec=_parse_spec(_field(node, "spec", dict, path), path),
        k=_size(_field(node, "k", int, path), path),
        n=_size(_field(node, "n", int, path), path),
        fields={name: _parse_array(f"{path}/{name}", field) for name, field in fields.items()},
    )
    fmt.check_qtensor(path, entry)
    return entry


def _parse_array(path: str, node: Any) -> ArrayEntry:
    node = _mapping(node, path)
    _only(node, ("dtype", "shape", "sha256", "chunk_shape", "chunks", "split"), path)
    dtype = _field(node, "dtype", str, path)
    if dtype not in fmt.DTYPES:
        raise CheckpointError(f"{path}: dtype {dtype!r} is not one of {', '.join(fmt.DTYPES)}")
    shape = tuple(_size(size, path) for size in _field(node, "shape", list, path))
    entry = ArrayEntry(dtype, shape, _digest(node, "sha256", path))
    if "chunks" not in node:
        if "split" in node:
            raise CheckpointError(f"{path}: has a split, but no chunks")
        return entry
    chunks = dict(enumerate(_field(node, "chunks", list, path)))
    entry = dataclasses.replace(
        entry,
        chunk_shape=tuple(_size(size, path) for size in _field(node, "chunk_shape", list, path)),
        chunks=tuple(_digest(chunks, i, f"{path}: chunks") for i in chunks),
        split=_size(node["split"], path) if "split" in node else None,
    )
    _check_chunks(path, entry)
    return entry


def _check_chunks(path: str, entry: ArrayEntry) -> None:
    pairs = zip(entry.shape, entry.chunk_shape, strict=False)
    fits = len(entry.shape) == len(entry.chunk_shape) and all(c and n % c == 0 for n, c in pairs)
    if not fits or math.prod(entry.grid) != len(entry.chunks):
        raise CheckpointError(
            f"{path}: {len(entry.chunks)} chunks of {list(entry.chunk_shape)} do not make up "
            f"{list(entry.shape)}"
        )
    wanted = tuple(len(entry.chunks) if i == entry.split else 1 for i in range(len(entry.shape)))
    if entry.split is not None and (entry.split >= len(wanted) or entry.grid != wanted):
        raise CheckpointError(
            f"{path}: chunks of {list(entry.chunk_shape)} do not split axis {entry.split} of "
            f"{list(entry.shape)}"
        )
    if joint_digest(entry.chunks) != entry.sha256:
        raise CheckpointError(f"{path}: sha256 is not that of the chunks' digests")


def _parse_files(node: dict[str, Any], where: str, *, folders: bool) -> dict[str, FileEntry]:
    files = {}
    for name, entry in node.items():
        # Zarr's own files start with a dot, so these are not the names of `safe_name`.
        steps = name.split("/")
        plain = not any(step in ("", ".", "..") for step in steps) and not set(name) & {"\\", "\0"}
        if not plain or (len(steps) > 1 and not folders):
            raise CheckpointError(f"{where}: {name!r} would lead out of the checkpoint's folder")
        entry = _mapping(entry, f"{where}: {name}")
        _only(entry, ("bytes", "sha256"), name)
        size = _size(_field(entry, "bytes", int, name), name)
        files[name] = FileEntry(size, _digest(entry, "sha256", f"{where}: {name}"))
    return files


def _parse_spec(node: dict[str, Any], path: str) -> QuantSpec:
    values = dict(node)
    if values.get("activation") is not None:
        activation = _mapping(values["activation"], f"{path}: activation")
        values["activation"] = _parse_fields(ActivationSpec, activation, path)
    return _parse_fields(QuantSpec, values, path)


def _parse_fields(kind: type, node: Mapping[str, Any], path: str) -> Any:
    names = tuple(field.name for field in dataclasses.fields(kind))
    _only(node, names, f"{path}: {kind.__name__}")
    for name in names:
        value = _field(node, name, _TYPES.get(name, object), f"{path}: {kind.__name__}")
        choices = _CHOICES.get(name, {}).get(kind)
        if choices and value not in choices:
            raise CheckpointError(f"{path}: {name} {value!r} is not one of {', '.join(choices)}")
        if name == "dtype" and not isinstance(value, str):
            raise CheckpointError(f"{path}: dtype must be a string, got {value!r}")
    try:
        return kind(**node)
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _mapping(node: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(node, Mapping):
        raise CheckpointError(f"{where}: must be a JSON object, not {_short(node)}")
    return node


def _field(node: Mapping[Any, Any], key: Any, kind: type, where: str) -> Any:
    if key not in node:
        raise CheckpointError(f"{where}: {key!r} is missing")
    value = node[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where}: {key!r} must be {kind.__name__}, not {_short(value)}")
    return value


def _only(node: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    unknown = sorted(node.keys() - set(keys))
    if unknown:
        raise CheckpointError(
            f"{where}: unknown key {unknown[0]!r}; known: {', '.join(keys)} "
            "(written by another version of jaxq?)"
        )


def _size(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise CheckpointError(f"{where}: {_short(value)} is not a size")
    return value


def _digest(node: Mapping[Any, Any], key: Any, where: str) -> str:
    value = _field(node, key, str, where)
    if len(value) != 64 or not set(value) <= _HEX:
        raise CheckpointError(f"{where}: {_short(value)} is not a sha256 in hex")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
