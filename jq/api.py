"""From a folder to a model and back.

model, params = load("path/to/checkpoint")
logits = model.apply({"params": params}, tokens)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jq import checkpoint, tree
from jq.checkpoint.format import Manifest, QTensorEntry
from jq.checkpoint.reader import Shardings, place_array
from jq.cuts import CutRule, Weight
from jq.errors import CheckpointError, SpecError
from jq.formats.reader import QuantizedCheckpoint, is_quantized_folder
from jq.models import Decoder, HFCheckpoint, ModelConfig
from jq.models.hf_names import mapping_failures, weight_table
from jq.tensor_parallel import TensorParallel, unsharded


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    verify: bool = True,
    shardings: Shardings | None = None,
    mesh: Mesh | None = None,
    axis: str = "model",
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """Load a jaxq checkpoint, or a Hugging Face folder.

    The weights of a Hugging Face folder may be unquantized, or quantized by another tool: GPTQ, AWQ
    and compressed-tensors become QTensors, bit for bit.

    Args:
      path: the folder.
      dtype: of activations. None is the dtype of the embedding, but float32 on a CPU, which has no
        fast 16-bit arithmetic. Parameters keep the dtypes they were stored with.
      verify: compare the digest of every tensor (folders that jaxq made have them).
      shardings: gives the jax.sharding.Sharding of an array from its path
        ("layers_0/mlp/up_proj/kernel", and ".../kernel/codes" etc. of a QTensor) and shape; None,
        as a function or as a result, is JAX's default device.
      mesh, axis: cut the model over this axis of a mesh, by the rule of `jq.tensor_parallel`, in
        the place of `shardings`; each device gets its shards only. (Folders that another tool has
        quantized are converted on JAX's default device first.)
      progress: called with (tensors read, tensors in all, path) while the weights of another tool
        are converted.
    Returns: (model, params), to be used as `model.apply({"params": params}, tokens)`.
    Raises:
      ModelError: no model in the folder, or of an unknown architecture.
      CheckpointError: damaged, incomplete, or of other shapes than config.json says.
      SpecError: a linear of another tool that a QTensor cannot hold; a mesh whose shards would cut
        groups of inputs.
    """
    path, rule = Path(path), None
    if mesh is not None:
        if shardings is not None:
            raise SpecError("mesh and shardings both say where arrays lie; give one of them")
        rule = TensorParallel(Decoder(ModelConfig.from_folder(path)), mesh, axis)
    if checkpoint.is_checkpoint(path):
        manifest = checkpoint.read_manifest(path)
        config = ModelConfig.from_folder(path)
        parts = manifest.parts.values()
        shapes = {name: entry.shape for part in parts for name, entry in part.tensors.items()}
        _check_shapes(str(path), config, shapes)
        checkpoint.check_files(path, manifest)
        if rule is not None:
            shardings = rule.placer(_quantized(manifest))
        params = checkpoint.load_params(path, verify=verify, shardings=shardings)
    else:
        if rule is not None and not is_quantized_folder(path):
            shardings = rule.placer({})
        place = _placer(shardings)
        if is_quantized_folder(path):
            source = QuantizedCheckpoint(path, place, progress, verify)
        else:
            source = HFCheckpoint(path, place=place)
        config, params = source.config, source.load()
    if rule is not None:
        params = rule.shard(params)
    if dtype is None:
        dtype = compute_dtype(params["embed"]["embedding"].dtype)
    return Decoder(config, dtype=dtype), params


def save(
    path: str | os.PathLike[str],
    model: Decoder,
    params: Mapping[str, Any],
    *,
    config_files_from: str | os.PathLike[str] | None = None,
    meta: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a jaxq checkpoint of a model whose parameters are all there.

    Models that are quantized block by block are written with `jq.checkpoint.CheckpointWriter`.

    Args:
      path: the folder to make; see `CheckpointWriter`.
      model: its config becomes config.json, unless `config_files_from` has one.
      params: arrays and QTensors, whole or cut over a mesh: the files are the same.
      config_files_from: the model folder that config and tokenizer files are copied from.
      meta: facts for the manifest: recipe, calibration, ...
      report: what was measured per layer.
      overwrite: replace an existing jaxq checkpoint.
    Raises:
      CheckpointError: parameters that do not fit the model or cannot be stored.
      OutputError: the folder is not empty, not writable, or there is no room.
    """
    params = unsharded(params)
    shapes = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in tree.leaves(params)}
    _check_shapes(str(path), model.config, shapes)
    config = (json.dumps(model.config.to_hf(), indent=2) + "\n").encode()
    files = {} if config_files_from is not None else {"config.json": config}
    with checkpoint.CheckpointWriter(
        path,
        config_files_from=config_files_from,
        files=files,
        overwrite=overwrite,
        cuts=CutRule(model),
    ) as writer:
        for name, subtree in params.items():
            writer.write_part(name, subtree)
        writer.finish(meta, report)


def _check_shapes(path: str, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    expected = {entry.path: entry.shape for entry in weight_table(config)}
    failures = mapping_failures(expected, found)
    if failures:
        raise CheckpointError(
            f"{path}: the tensors do not fit the {config.model_type} config: {failures}"
        )


def _quantized(manifest: Manifest) -> dict[str, Weight]:
    return {
        path: Weight(entry.spec, entry.k, entry.n, "order" in entry.fields)
        for part in manifest.parts.values()
        for path, entry in part.tensors.items()
        if isinstance(entry, QTensorEntry)
    }


def _placer(shardings: Shardings | None) -> Callable[[str, np.ndarray], jax.Array] | None:
    if shardings is None:
        return None
    # A copy: the result must not change when the mapped file does.
    return lambda name, array: place_array(name, np.array(array), shardings)


def compute_dtype(stored: Any) -> Any:
    """The dtype to run a model in whose embedding is stored in another: that one, but float32 on a
    CPU, which has no fast 16-bit arithmetic."""
    return jnp.float32 if jax.default_backend() == "cpu" else stored
