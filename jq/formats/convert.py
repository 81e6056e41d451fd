"""From one format of quantized models to another, a block at a time and bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jq import checkpoint
from jq.checkpoint.format import EXPORT_MANIFEST, REPORT, QTensorEntry
from jq.checkpoint.writer import CheckpointWriter
from jq.cuts import CutRule
from jq.errors import CheckpointError, ModelError
from jq.formats.export import ExportWriter, plain_config
from jq.formats.plan import ExportFormat, FormatOptions, PlannedLinear, Scheme, schemes_for
from jq.formats.reader import QuantizedCheckpoint, is_quantized_folder
from jq.formats.shards import SHARD_BYTES
from jq.interrupts import held_back

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion made.

    path: the folder.
    linears: how many of its linears are quantized.
    seconds: from the first tensor read to the folder in its place.
    """

    path: Path
    linears: int
    seconds: float


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target: Literal["orbax"] | ExportFormat = "orbax",
    *,
    options: FormatOptions | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a quantized model in another format: codes, scales and zero points stay as they are.

    Args:
      path: a jaxq checkpoint, or a folder of GPTQ, AWQ or compressed-tensors.
      out: the folder to make; it appears complete or not at all.
      target: "orbax" is jaxq's own.
      options: see `jq.formats.plan.FormatOptions`.
      shard_bytes: limit of a weight file; one such file and one block are held in memory.
      overwrite: replace an existing folder that jaxq has made.
      progress: called with (parts written, parts in all, name) after each top-level part.
    Raises:
      SpecError: the target cannot express the model; every linear is named, nothing is written.
      ModelError, CheckpointError: no quantized model, or a damaged one.
      OutputError: the output folder is not empty, not writable, or there is no room.
    """
    start = time.perf_counter()
    source = _open(Path(path))
    if target == "orbax":
        if isinstance(source, _OwnSource):
            raise ModelError(f"{path} is a jaxq checkpoint already; give --format another one")
        from jq.models import Decoder  # which needs flax

        opened = CheckpointWriter(
            out,
            config_files_from=path,
            files={"config.json": plain_config(Path(path))},
            overwrite=overwrite,
            cuts=CutRule(Decoder(source.config)),
        )
    else:
        opened = ExportWriter(
            out,
            target,
            schemes_for(source.plan, target, options),
            config_files_from=path,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
        )
    with opened as writer:
        for done, (name, subtree) in enumerate(source.parts(), start=1):
            writer.write_part(name, subtree)
            if progress is not None:
                progress(done, source.num_parts, name)
        with held_back():
            writer.finish(source.meta, _report(Path(path)))
    return Converted(writer.path, len(source.plan), time.perf_counter() - start)


class _OwnSource:
    """A jaxq checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        manifest = checkpoint.read_manifest(path)
        checkpoint.check_files(path, manifest)
        self.meta: Mapping[str, Any] = manifest.meta
        self.num_parts = len(manifest.parts)
        self.plan = {
            name: PlannedLinear(entry.spec, entry.k, entry.n, "order" in entry.fields)
            for part in manifest.parts.values()
            for name, entry in part.tensors.items()
            if isinstance(entry, QTensorEntry)
        }

    def parts(self) -> Iterator[tuple[str, Any]]:
        return checkpoint.iter_parts(self._path)


class _ForeignSource:
    """A folder that another tool, or an export, has made.  Its arrays stay on the host."""

    def __init__(self, path: Path) -> None:
        self._checkpoint = QuantizedCheckpoint(path, place=_on_host)
        self.config = self._checkpoint.config
        self.meta = _export_meta(path)
        self.plan = {
            tensor.path: _planned(tensor.scheme, *tensor.shape)
            for tensor in self._checkpoint.stored()
            if tensor.scheme is not None
        }
        heads = {tensor.path.partition("/")[0] for tensor in self._checkpoint.stored()}
        self.num_parts = len(heads)

    def parts(self) -> Iterator[tuple[str, Any]]:
        outer = self._checkpoint.outer()
        yield "embed", outer.pop("embed")
        for name in self._checkpoint.block_names:
            yield name, self._checkpoint.block(name)
        yield from outer.items()


def _open(path: Path) -> _OwnSource | _ForeignSource:
    if checkpoint.is_checkpoint(path):
        return _OwnSource(path)
    if is_quantized_folder(path):
        return _ForeignSource(path)
    raise ModelError(
        f"{path} is not quantized; `jaxq quantize` does that, and writes any format at once"
    )


def _on_host(path: str, array: np.ndarray) -> Any:
    return array


def _planned(scheme: Scheme, k: int, n: int) -> PlannedLinear:
    # How scales are stored is seen when they are read, and then checked; any dtype will do here.
    ordered = getattr(scheme, "desc_act", False) or getattr(scheme, "act_order", False)
    return PlannedLinear(scheme.spec("float16"), k, n, ordered)


def _export_meta(path: Path) -> Mapping[str, Any]:
    """What a former export says of the model's origin; else its name."""
    file = path / EXPORT_MANIFEST
    told = json.loads(file.read_bytes()).get("meta") if file.is_file() else None
    return told if isinstance(told, dict) else {"model": path.resolve().name}


def _report(path: Path) -> dict[str, Any] | None:
    file = path / REPORT
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}; remove it") from error
    return told if isinstance(told, dict) else None
