"""Model folders that other tools have quantized, read block by block into QTensors.

    checkpoint = QuantizedCheckpoint("path/to/model-gptq")
    params = checkpoint.load()                       # or checkpoint.block("layers_0"), ...
    logits = Decoder(checkpoint.config).apply({"params": params}, tokens)

One linear is converted at a time, from the mapped file to its place; nothing is dequantized.  Only
safetensors are read, and no code of a checkpoint is ever executed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq import tree
from jq.checkpoint.digests import array_digest
from jq.checkpoint.format import EXPORT_MANIFEST
from jq.errors import CheckpointError, ModelError
from jq.formats import awq, compressed_tensors, gptq
from jq.formats.quant_config import QuantConfig, Scheme, parse, quantization_of
from jq.models.config import ModelConfig
from jq.models.hf_names import (
    WeightEntry,
    block_table,
    ignored,
    mapping_failures,
    outer_table,
    weight_table,
)
from jq.models.hf_values import read_json
from jq.models.hf_weights import Place, collect, place_whole, weight_files
from jq.models.safetensors_file import SafetensorsFile, load_json_strictly
from jq.qtensor import QTensor

Params = dict[str, Any]
Progress = Callable[[int, int, str], None]

# What weights in full precision may be stored as.
_PLAIN = ("float16", "bfloat16", "float32", "float64")


def is_quantized_folder(path: Path) -> bool:
    """Whether another tool's config says that the model in this folder is quantized."""
    file = path / "config.json"
    return file.is_file() and quantization_of(path, read_json(file)) is not None


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model as the files hold it.

    path, shape: in the parameter tree.
    dtype: of a tensor in full precision; None where it is quantized.
    nbytes: everything stored for it.
    scheme: how it is quantized; None in full precision.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str | None
    nbytes: int
    scheme: Scheme | None


class QuantizedCheckpoint:
    """A model folder with GPTQ, AWQ or compressed-tensors weights.

    Opening reads the headers of all files and compares the names with what config.json says is
    quantized; each linear is checked in full when it is read.

    Args:
      path: the folder.
      place: makes a device array of (parameter path, host array); a QTensor's arrays have paths of
        their own ("layers_0/mlp/up_proj/kernel/codes").  The default puts it whole on JAX's default
        device.  The host array may be a view into the mapped file.
      progress: called with (tensors read, tensors in all, path) after each tensor.
      verify: compare the digests of tensors where the folder has them, as those jaxq made do.

    Attributes:
      path, config.
      raw_config: the parsed `config.json`.
      quantization: what it says of each linear.
      files: the weight files, in order.

    Raises:
      ModelError: no such folder, a quantization that is unknown, pickled weights only, or names
        that do not fit the config (all disagreements at once).
      CheckpointError: a damaged safetensors or index file.
    """

    def __init__(
        self,
        path: str | Path,
        place: Place | None = None,
        progress: Progress | None = None,
        verify: bool = True,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelError(f"{self.path} is not a folder; give the folder with config.json")
        self.raw_config = read_json(self.path / "config.json")
        self.config = ModelConfig.from_folder(self.path)
        self.quantization = _parse(self.path, self.raw_config)
        self._place = place if place is not None else place_whole
        self._progress = progress
        self._read_count = 0
        names, weight_map = weight_files(self.path)
        self.files = tuple(self.path / name for name in names)
        self._readers = [SafetensorsFile(file) for file in self.files]
        self._tensors = collect(self._readers, weight_map)
        self._table = weight_table(self.config)
        self._schemes = {e.key: _scheme(self.quantization, e) for e in self._table}
        self._check_names()
        self._digests = _digests(self.path, self._tensors) if verify else {}

    @property
    def block_names(self) -> tuple[str, ...]:
        """("layers_0", "layers_1", ...)."""
        return tuple(f"layers_{i}" for i in range(self.config.num_hidden_layers))

    def block(self, name: str) -> Params:
        """The parameters of one layer, as the block itself wants them (no "layers_0" level).

        Raises: CheckpointError naming the tensor that disagrees with config.json or is damaged;
          SpecError for a linear that a QTensor cannot hold.
        """
        if name not in self.block_names:
            raise ModelError(f"no block {name!r}; blocks are layers_0 to {self.block_names[-1]}")
        index = int(name.removeprefix("layers_"))
        return self._read(block_table(self.config, index))[name]

    def outer(self) -> Params:
        """`embed`, `final_norm` and, unless tied, `lm_head`."""
        return self._read(outer_table(self.config))

    def load(self) -> Params:
        """The whole parameter tree."""
        self._read_count = 0
        outer = self.outer()
        blocks = {name: self.block(name) for name in self.block_names}
        return {"embed": outer.pop("embed"), **blocks, **outer}

    def stored(self) -> list[StoredTensor]:
        """What the headers say of every tensor of the model, in the order of the tree."""
        found = []
        for entry in self._table:
            infos = [self._tensors[key].tensors[key] for key in self._keys(entry).values()]
            scheme = self._schemes[entry.key]
            dtype = infos[0].dtype.name if scheme is None else None
            nbytes = sum(info.end - info.begin for info in infos)
            found.append(StoredTensor(entry.path, entry.shape, dtype, nbytes, scheme))
        return found

    def _read(self, table: Iterable[WeightEntry]) -> Params:
        params: Params = {}
        for entry in table:
            params = tree.replace(params, entry.path, self._leaf(entry))
            for reader in self._readers:
                reader.release()
            self._read_count += 1
            if self._progress is not None:
                done = min(self._read_count, len(self._table))
                self._progress(done, len(self._table), entry.path)
        return params

    def _leaf(self, entry: WeightEntry) -> Any:  # what `place` makes, or a QTensor of it
        arrays = {suffix: self._array(key) for suffix, key in self._keys(entry).items()}
        scheme = self._schemes[entry.key]
        if scheme is None:
            (array,) = arrays.values()
            return self._place(entry.path, array.T if entry.transpose else array)
        k, n = entry.shape
        w = _to_qtensor(arrays, scheme, (k, n), _module(entry))
        names = [field.name for field in dataclasses.fields(w) if field.name not in _STATIC]
        placed = {
            name: self._place(f"{entry.path}/{name}", np.asarray(leaf))
            for name in names
            if (leaf := getattr(w, name)) is not None
        }
        return dataclasses.replace(w, **placed)

    def _array(self, key: str) -> np.ndarray:
        array = self._tensors[key].read(key)
        wanted = self._digests.get(key)
        if wanted is not None and (found := array_digest(array)) != wanted:
            raise CheckpointError(
                f"{key}: sha256 of the stored data is {found}, but {EXPORT_MANIFEST} says "
                f"{wanted}: the data is damaged; copy {self._tensors[key].path} again"
            )
        return array

    def _keys(self, entry: WeightEntry) -> dict[str, str]:
        """Suffix -> name of every tensor that is stored for a parameter."""
        scheme = self._schemes[entry.key]
        if scheme is None:
            return {"": entry.key}
        named = {suffix: f"{_module(entry)}.{suffix}" for suffix in _suffixes(scheme)}
        return {suffix: key for suffix, key in named.items() if key in self._tensors}

    def _check_names(self) -> None:
        plain = {e.key: e.stored_shape for e in self._table if self._schemes[e.key] is None}
        packed = [e for e in self._table if self._schemes[e.key] is not None]
        claimed = {key for entry in packed for key in self._keys(entry).values()}
        main = {
            entry.key: f"{_module(entry)}.{_main(self._schemes[entry.key])}" for entry in packed
        }
        bare = [key for key in main if main[key] not in self._tensors and key in self._tensors]
        lost = {main[key]: () for key in main if main[key] not in self._tensors and key not in bare}
        found = {
            key: file.tensors[key].shape
            for key, file in self._tensors.items()
            if key in plain
            or not (key in claimed or key in bare or ignored(key, self.config) or self._zero(key))
        }
        wrong = [
            key
            for key in plain
            if key in found and self._tensors[key].tensors[key].dtype.name not in _PLAIN
        ]
        self._refuse(mapping_failures({**plain, **lost}, found), wrong, bare)

    def _refuse(self, failures: str | None, wrong: list[str], bare: list[str]) -> None:
        parts = [failures] if failures else []
        if wrong:
            parts.append(f"not in full precision ({len(wrong)}): {', '.join(wrong[:20])}")
        if bare:
            parts.append(
                f"stored in full precision, but quantized by config.json ({len(bare)}): "
                f"{', '.join(bare[:20])}"
            )
        if parts:
            raise ModelError(
                f"{self.path}: the weights do not fit config.json (model_type "
                f"{self.config.model_type}, quant_method {self.quantization.method}): "
                f"{'; '.join(parts)}"
            )

    def _zero(self, key: str) -> bool:
        """Whether this is a bias of zeros: AutoGPTQ writes them for linears that have none."""
        module, _, suffix = key.rpartition(".")
        quantized = self._schemes.get(f"{module}.weight") is not None
        return suffix == "bias" and quantized and not np.any(self._tensors[key].read(key))


_STATIC = ("spec", "k", "n")


def _parse(path: Path, raw: Mapping[str, Any]) -> QuantConfig:
    told = quantization_of(path, raw)
    if told is None:
        raise ModelError(f"{path}: config.json has no quantization_config: it is not quantized")
    try:
        return parse(told)
    except ModelError as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from error


def _scheme(config: QuantConfig, entry: WeightEntry) -> Scheme | None:
    linear = entry.path.endswith("/kernel")
    return config.scheme(_module(entry)) if linear else None


def _module(entry: WeightEntry) -> str:
    return entry.key.removesuffix(".weight")


def _suffixes(scheme: Scheme) -> tuple[str, ...]:
    """Of everything that may be stored for a linear."""
    match scheme:
        case gptq.GPTQScheme():
            return gptq.SUFFIXES
        case awq.AWQScheme():
            return awq.SUFFIXES
        case compressed_tensors.CompressedTensorsScheme():
            packed = scheme.format == "pack-quantized"
            return compressed_tensors.PACKED if packed else compressed_tensors.PLAIN


def _main(scheme: Scheme | None) -> str:
    """The suffix of the codes, which is listed first."""
    assert scheme is not None
    return _suffixes(scheme)[0]


def _to_qtensor(
    arrays: Mapping[str, np.ndarray], scheme: Scheme, shape: tuple[int, int], module: str
) -> QTensor:
    match scheme:
        case gptq.GPTQScheme():
            return gptq.to_qtensor(arrays, scheme, shape, module)
        case awq.AWQScheme():
            return awq.to_qtensor(arrays, scheme, shape, module)
        case compressed_tensors.CompressedTensorsScheme():
            return compressed_tensors.to_qtensor(arrays, scheme, shape, module)


def _digests(path: Path, tensors: Mapping[str, SafetensorsFile]) -> dict[str, str]:
    """Name -> digest of every tensor, of a folder that jaxq made; {} of any other.

    Raises: CheckpointError where the tensors are not those that were written.
    """
    file = path / EXPORT_MANIFEST
    if not file.is_file():
        return {}
    manifest = load_json_strictly(file.read_bytes(), file)
    digests = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(digests, dict):
        raise CheckpointError(f"{file}: no sha256 of the tensors; copy the folder again")
    for key in digests.keys() ^ tensors.keys():
        has, lacks = (file.name, "weights") if key in digests else ("weights", file.name)
        raise CheckpointError(f"{key}: is in the {has} of {path}, but not in its {lacks}")
    return digests
