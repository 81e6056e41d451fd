"""Write quantized models as folders of other tools: GPTQ, AWQ, compressed-tensors.

A folder holds config.json with its `quantization_config` (GPTQ also quantize_config.json), weights
in shards, the tokenizer's and generation's files as they were, and jaxq_export.json: digests of all
tensors, by which `jq.load` notices damage, and where the model came from.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jq import tree
from jq.checkpoint.folder_writer import FolderWriter
from jq.checkpoint.format import CONFIG_FILES, EXPORT_MANIFEST, REPORT
from jq.checkpoint.manifest import encode_json, library_versions
from jq.distributed import Team
from jq.errors import CheckpointError
from jq.formats import awq, compressed_tensors, gptq
from jq.formats.arrays import pack_codes, unpack_codes
from jq.formats.awq import AWQScheme
from jq.formats.compressed_tensors import CompressedTensorsScheme
from jq.formats.config_json import quantization_config
from jq.formats.gptq import GPTQScheme
from jq.formats.plan import ExportFormat, Scheme
from jq.formats.shards import SHARD_BYTES, ShardWriter
from jq.models.config import ModelConfig
from jq.models.hf_names import WeightEntry, weight_table
from jq.models.hf_values import read_json
from jq.qtensor import QTensor

# What describes how another tool had stored a model that is stored anew.
_STALE = ("quantization_config", "compression_config")
# Files of a model folder that go along, beside those of a checkpoint.
_CARRIED = (
    *CONFIG_FILES,
    *("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model", "chat_template.json"),
)


class ExportWriter(FolderWriter):
    """Build a folder of another tool's format, which appears complete or not at all.

        schemes = schemes_for(plan, "gptq")
        with ExportWriter(path, "gptq", schemes, config_files_from=folder) as writer:
            for name, subtree in params.items():
                writer.write_part(name, subtree)
            writer.finish()

    Has the methods of `jq.checkpoint.CheckpointWriter`, and can stand in its place. Host memory
    holds one shard beside the part that is written.

    Args:
      path: the folder to make.
      target: the format.
      schemes: how each quantized linear is stored, by its path ("layers_0/mlp/up_proj/kernel");
        what is not named is an array.
      config_files_from: the model folder that config and tokenizer files come from.
      shard_bytes: limit of a weight file.
      overwrite: replace an existing folder that jaxq has made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        target: ExportFormat,
        schemes: Mapping[str, Scheme],
        *,
        config_files_from: str | os.PathLike[str],
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        super().__init__(path, overwrite=overwrite, team=Team(index=0, count=1))
        self._target: ExportFormat = target
        self._schemes = dict(schemes)
        self._source = Path(config_files_from)
        self._config = read_json(self._source / "config.json")
        entries = weight_table(ModelConfig.from_hf(self._config))
        self._entries = {entry.path: entry for entry in entries}
        self._waiting = dict(self._entries)
        self._shard_bytes = shard_bytes

    def __enter__(self) -> ExportWriter:
        """Take the folder's lock and clear away what dead processes left.

        Raises: OutputError when the folder is not empty, not writable, or being written by another;
        CheckpointError in another process than the first; SpecError for a shard size that is none.
        """
        if jax.process_index() > 0:
            raise CheckpointError(
                f"{self.path}: folders for other tools are written by process 0, and this one is "
                f"{jax.process_index()} of {jax.process_count()}"
            )
        with self._build() as partial:
            self._shards = ShardWriter(partial, self._shard_bytes)
        return self

    def write_part(self, name: str, subtree: Any) -> None:
        """Write one top-level entry of the parameter tree, for instance "layers_0".

        Raises:
          CheckpointError: a leaf that the model has no place for, or of another shape; a QTensor
            where an array was announced, or the other way round.
          SpecError: a QTensor that is not of its scheme.
          OutputError: no room, or the disk refuses.
        """
        self._open()
        for path, leaf in tree.leaves({name: subtree}):
            for key, array in self._stored(path, leaf).items():
                self._shards.add(key, array)

    def finish(
        self, meta: Mapping[str, Any] | None = None, report: Mapping[str, Any] | None = None
    ) -> None:
        """Write config, tokenizer files and digests, and make the folder visible.

        Args:
          meta: facts for jaxq_export.json: recipe, calibration, ...
          report: what was measured per layer, for report.json.
        Raises: CheckpointError when parameters are missing; OutputError when the disk refuses.
        """
        self._open()
        if self._waiting:
            missing = ", ".join(list(self._waiting)[:20])
            raise CheckpointError(
                f"{self.path}: {len(self._waiting)} tensors are missing: {missing}"
            )
        self._shards.finish()
        small = self._small_files()
        if report is not None:
            small[REPORT] = encode_json(report, REPORT)
        manifest = {
            "format": self._target,
            "versions": library_versions(),
            "meta": dict(meta or {}),
            "sha256": dict(sorted(self._shards.digests.items())),
        }
        small[EXPORT_MANIFEST] = encode_json(manifest, EXPORT_MANIFEST)
        self._publish(small)

    def _stored(self, path: str, leaf: Any) -> dict[str, np.ndarray]:
        """Name -> array of everything that is stored for a leaf."""
        entry = self._waiting.pop(path, None)
        if entry is None:
            why = "was written already" if path in self._entries else "is none of the model's"
            raise CheckpointError(f"{path} {why}; parameters and config.json do not fit")
        if tuple(leaf.shape) != entry.shape:
            raise CheckpointError(
                f"{path}: shape {list(leaf.shape)}, config.json says {list(entry.shape)}"
            )
        scheme = self._schemes.get(path)
        if isinstance(leaf, QTensor) != (scheme is not None):
            kind = "quantized" if scheme is None else "not quantized"
            raise CheckpointError(f"{path} is {kind}, but was announced otherwise")
        if scheme is None:
            array = np.asarray(leaf)
            return {entry.key: array.T if entry.transpose else array}
        arrays = encode(jax.device_get(leaf), scheme, path)
        return {f"{module_of(entry)}.{suffix}": array for suffix, array in arrays.items()}

    def _small_files(self) -> dict[str, bytes]:
        present = [name for name in _CARRIED if (self._source / name).is_file()]
        found = {name: (self._source / name).read_bytes() for name in present}
        modules = {module_of(self._entries[path]): s for path, s in self._schemes.items()}
        linears = [
            module_of(entry)
            for path, entry in self._entries.items()
            if path.startswith("layers_") and path.endswith("/kernel")
        ]
        unquantized = [module for module in linears if module not in modules]
        quantization = quantization_config(self._target, modules, unquantized)
        kept = {key: value for key, value in self._config.items() if key not in _STALE}
        found["config.json"] = _json(kept | {"quantization_config": quantization})
        if self._target == "gptq":
            found["quantize_config.json"] = _json(quantization)
        return found


def module_of(entry: WeightEntry) -> str:
    """The module of a weight: "model.layers.0.mlp.down_proj"."""
    return entry.key.removesuffix(".weight")


def plain_config(path: Path) -> bytes:
    """A folder's config.json without what it says of quantization."""
    raw = read_json(path / "config.json")
    return _json({key: value for key, value in raw.items() if key not in _STALE})


def encode(w: QTensor, scheme: Scheme, path: str) -> dict[str, np.ndarray]:
    """The arrays of one linear by suffix; an order that matters to no scale is undone.

    Raises: SpecError for a QTensor that is not of the scheme.
    """
    match scheme:
        case GPTQScheme():
            return gptq.from_qtensor(w if scheme.desc_act else _in_order(w), scheme, path)
        case AWQScheme():
            return awq.from_qtensor(_in_order(w), scheme, path)
        case CompressedTensorsScheme():
            kept = _with_order(w) if scheme.act_order else _in_order(w)
            return compressed_tensors.from_qtensor(kept, scheme, path)


def _with_order(w: QTensor) -> QTensor:
    """A QTensor whose order is written down, be it the plain one."""
    if w.order is not None:
        return w
    return dataclasses.replace(w, order=np.arange(w.k, dtype=np.int32))


def _in_order(w: QTensor) -> QTensor:
    """Rows put back into the order of the inputs, where all rows of an output share a scale."""
    if w.order is None or w.spec.granularity not in ("channel", "tensor"):
        return w
    back = np.argsort(np.asarray(w.order))
    codes = np.asarray(w.codes)
    if w.spec.bits == 8:  # a row per input
        codes = codes[back]
    else:
        codes = pack_codes(unpack_codes(codes, w.spec.bits, w.k)[back], w.spec.bits)
    return dataclasses.replace(w, codes=codes, order=None)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
