"""Hugging Face model folders: reading block by block, and writing.

    checkpoint = HFCheckpoint("path/to/model")
    params = checkpoint.load()                       # or checkpoint.block("layers_0"), ...
    logits = Decoder(checkpoint.config).apply({"params": params}, tokens)

Only safetensors are read.  Pickled weights are refused and never opened; no code of a checkpoint is
ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq import tree
from jq.errors import CheckpointError, ModelError, OutputError
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
from jq.models.safetensors_file import SafetensorsFile, load_json_strictly, write_safetensors

Params = dict[str, Any]
Place = Callable[[str, np.ndarray], jax.Array]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class HFCheckpoint:
    """A model folder: `config.json` and safetensors weights.

    Opening reads the headers of all files and checks every name, shape and dtype against the
    config; weights are read when asked for, and only those.

    Args:
        path: the folder.
        dtype: convert floating weights to this dtype; None keeps the checkpoint's.
        place: makes a device array of (parameter path, host array); the default puts it whole on
            JAX's default device.  The host array may be a view into the mapped file.

    Attributes:
        path, config.
        raw_config: the parsed `config.json`.
        files: the weight files, in order.

    Raises:
        ModelError: no such folder, no model in it, pickled weights only, an unknown architecture,
            an index that points outside the folder or names missing files, a model that is already
            quantized, or weights that do not fit the config (all disagreements at once).
        CheckpointError: a damaged safetensors or index file.
    """

    def __init__(self, path: str | Path, dtype: Any = None, place: Place | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelError(f"{self.path} is not a folder; give the folder with config.json")
        self.raw_config = read_json(self.path / "config.json")
        self.config = ModelConfig.from_folder(self.path)
        _refuse_quantized(self.path, self.raw_config)
        self._dtype = None if dtype is None else jnp.dtype(dtype)
        self._place = place if place is not None else place_whole
        names, weight_map = weight_files(self.path)
        self.files = tuple(self.path / name for name in names)
        self._readers = [SafetensorsFile(file) for file in self.files]
        self._tensors = collect(self._readers, weight_map)
        self._check()

    @property
    def block_names(self) -> tuple[str, ...]:
        """("layers_0", "layers_1", ...)."""
        return tuple(f"layers_{i}" for i in range(self.config.num_hidden_layers))

    def block(self, name: str) -> Params:
        """The parameters of one layer, as the block itself wants them (no "layers_0" level)."""
        if name not in self.block_names:
            raise ModelError(f"no block {name!r}; blocks are layers_0 to {self.block_names[-1]}")
        index = int(name.removeprefix("layers_"))
        return self._read(block_table(self.config, index))[name]

    def outer(self) -> Params:
        """`embed`, `final_norm` and, unless tied, `lm_head`."""
        return self._read(outer_table(self.config))

    def load(self) -> Params:
        """The whole parameter tree."""
        outer = self.outer()
        blocks = {name: self.block(name) for name in self.block_names}
        return {"embed": outer.pop("embed"), **blocks, **outer}

    def _read(self, table: Iterable[WeightEntry]) -> Params:
        params: Params = {}
        for entry in table:
            array = self._tensors[entry.key].read(entry.key)
            if self._dtype is not None:
                array = array.astype(self._dtype)
            array = array.T if entry.transpose else array
            params = tree.replace(params, entry.path, self._place(entry.path, array))
        for reader in self._readers:
            reader.release()
        return params

    def _check(self) -> None:
        expected = {entry.key: entry.stored_shape for entry in weight_table(self.config)}
        found = {
            key: file.tensors[key].shape
            for key, file in self._tensors.items()
            if key in expected or not ignored(key, self.config)
        }
        failures = [mapping_failures(expected, found)]
        wrong = [k for k in expected if k in found and not _is_float(self._tensors[k], k)]
        if wrong:
            failures.append(f"not floating point ({len(wrong)}): {', '.join(wrong[:20])}")
        text = "; ".join(f for f in failures if f)
        if text:
            raise ModelError(
                f"{self.path}: the weights do not fit config.json "
                f"(model_type {self.config.model_type}): {text}"
            )


def save_hf(
    params: Mapping[str, Any], config: ModelConfig, path: str | Path, overwrite: bool = False
) -> None:
    """Write `config.json` and `model.safetensors` of an unquantized model.

    Raises:
        ModelError: the tree does not fit the config, or has quantized leaves.
        OutputError: the folder holds a model already and `overwrite` is False.
    """
    path = Path(path)
    leaves = dict(tree.leaves(params))
    quantized = [name for name, leaf in leaves.items() if not hasattr(leaf, "__array__")]
    if quantized:
        raise ModelError(
            f"save_hf writes plain arrays only; not an array ({len(quantized)}): {quantized[0]}. "
            "Quantized models are saved with jq's own checkpoints or exported"
        )
    table = weight_table(config)
    expected = {entry.path: entry.shape for entry in table}
    failures = mapping_failures(expected, {name: leaf.shape for name, leaf in leaves.items()})
    if failures:
        raise ModelError(f"the parameters do not fit the config: {failures}")
    taken = [name for name in ("config.json", SINGLE, INDEX) if (path / name).exists()]
    if taken and not overwrite:
        raise OutputError(f"{path} holds {', '.join(taken)} already; pass overwrite=True")
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for entry in table:
        array = np.asarray(leaves[entry.path])
        tensors[entry.key] = array.T if entry.transpose else array
    raw = config.to_hf() | {"dtype": str(np.asarray(leaves["embed/embedding"]).dtype)}
    write_safetensors(path / SINGLE, tensors, {"format": "pt"})
    (path / INDEX).unlink(missing_ok=True)
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def place_whole(path: str, array: np.ndarray) -> jax.Array:
    """The array on JAX's default device."""
    # A copy: the result must not change or fault when the mapped file does.
    return jnp.array(array, copy=True)


def place_on_host(path: str, array: np.ndarray) -> Any:
    """The array as it is: a view of the mapped file, of which nothing is read yet."""
    return array


def _is_float(file: SafetensorsFile, key: str) -> bool:
    return jnp.issubdtype(file.tensors[key].dtype, jnp.floating)


def _refuse_quantized(path: Path, raw: Mapping[str, Any]) -> None:
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{path} is already quantized (quant_method {method!r}): to quantize, give the "
            "original model; jq.load, generate and eval take gptq, awq and compressed-tensors as "
            "they are"
        )


def weight_files(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of a folder's weight files and, where there is an index, its tensor name -> file name.

    Raises: ModelError for pickled weights only, none at all, or an index that names files outside
        the folder or missing ones; CheckpointError for a damaged index.
    """
    if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
        _check_file(path, SINGLE, "the folder")
        return [SINGLE], None
    if (path / INDEX).exists():
        weight_map = _read_index(path / INDEX)
        names = sorted(set(weight_map.values()))
        for name in names:
            _check_file(path, name, INDEX)
        return names, weight_map
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{path} has pickled weights only ({pickles[0]}), which can run code when opened and "
            "are never read; convert them to safetensors first"
        )
    raise ModelError(f"{path} has neither {SINGLE} nor {INDEX}")


def _read_index(file: Path) -> dict[str, str]:
    index = load_json_strictly(file.read_bytes(), file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{file}: weight_map must map tensor names to file names")
    return weight_map


def _check_file(path: Path, name: str, source: str) -> None:
    if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        raise ModelError(
            f"{path}: {source} names {name!r}; weight files must be plain .safetensors names in "
            "the model's folder"
        )
    file = path / name
    if file.is_symlink():
        folder = file.resolve().parent
        # The Hugging Face cache links snapshots/<revision>/<name> to blobs/<digest>.
        blobs = path.resolve().parent.parent / "blobs"
        if folder not in (path.resolve(), blobs):
            raise ModelError(
                f"{file} is a link to {file.resolve()}, outside the model's folder; copy the file"
            )
    if not file.is_file():
        raise ModelError(f"{path}: {source} names {name!r}, which is missing; download it again")


def collect(
    files: Iterable[SafetensorsFile], weight_map: Mapping[str, str] | None
) -> dict[str, SafetensorsFile]:
    """Tensor name -> its file; every name in exactly one file, the one the index says.

    Raises: ModelError for names in two files, or in another than the index says.
    """
    tensors: dict[str, SafetensorsFile] = {}
    for file in files:
        for key in file.tensors:
            if key in tensors:
                raise ModelError(f"{key} is in both {tensors[key].path} and {file.path}")
            tensors[key] = file
    for key, name in (weight_map or {}).items():
        actual = tensors[key].path.name if key in tensors else None
        if actual != name:
            raise ModelError(
                f"the index places {key} in {name}, but it is in {actual or 'no file'}"
            )
    return tensors
