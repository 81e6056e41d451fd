"""Facts about a model folder, from headers and manifests; no weight is read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jq.checkpoint import Manifest, is_checkpoint, read_manifest
from jq.checkpoint.format import REPORT, ArrayEntry, QTensorEntry
from jq.errors import CheckpointError
from jq.formats.reader import QuantizedCheckpoint, StoredTensor, is_quantized_folder
from jq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a model.

    path, shape: logical ones, "layers_0/mlp/up_proj/kernel" [K, N].
    dtype: of its values; for a quantized tensor that of its codes ("int4 g128").
    nbytes: everything stored for it, scales included.
    quantized: whether it is a QTensor.
    report: what the run said of it, {} where nothing.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    quantized: bool = False
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Weights it stands for."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return self.nbytes * 8 / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class Totals:
    """linear_bits: bits per weight over the quantized linears (NaN where there are none);
    model_bits: over the whole model; weights: their count; file_bytes: of the folder."""

    linear_bits: float
    model_bits: float
    weights: int
    file_bytes: int


def checkpoint_tensors(manifest: Manifest, told: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a jaxq checkpoint, layers in order; `told` is that of `read_report`."""
    parts = sorted(manifest.parts.items(), key=lambda item: _place(item[0]))
    return [
        _tensor(path, entry, told.get(path, {}))
        for _, part in parts
        for path, entry in part.tensors.items()
    ]


def hf_tensors(path: Path) -> list[Tensor]:
    """The tensors of a Hugging Face folder, under the parameters' names."""
    from jq.models import HFCheckpoint
    from jq.models.hf_names import weight_table
    from jq.models.safetensors_file import SafetensorsFile

    if is_quantized_folder(path):
        return [_stored(tensor) for tensor in QuantizedCheckpoint(path).stored()]
    checkpoint = HFCheckpoint(path)
    infos = {
        key: info
        for file in checkpoint.files
        for key, info in SafetensorsFile(file).tensors.items()
    }
    return [
        Tensor(
            entry.path,
            entry.shape,
            infos[entry.key].dtype.name,
            infos[entry.key].end - infos[entry.key].begin,
        )
        for entry in weight_table(checkpoint.config)
    ]


def read_report(path: Path) -> dict[str, Any]:
    """What report.json says of each tensor, by path; {} where there is none.

    Raises: CheckpointError for a file that a run of ours did not write.
    """
    file = path / REPORT
    if not file.is_file():
        return {}
    try:
        blocks = json.loads(file.read_text(encoding="utf-8"))["blocks"]
        linears = [linear for block in blocks for linear in block["linears"]]
        return {f"{linear['path']}/kernel": dict(linear) for linear in linears}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is no report of jaxq ({type(error).__name__}: {error}); remove it to go on "
            "without"
        ) from error


def totals(tensors: Iterable[Tensor], path: Path) -> Totals:
    """Sums over the tensors of a folder."""
    tensors = list(tensors)
    quantized = [t for t in tensors if t.quantized]
    weights = sum(t.size for t in tensors)
    linear = sum(t.size for t in quantized)
    return Totals(
        sum(t.nbytes for t in quantized) * 8 / linear if linear else math.nan,
        sum(t.nbytes for t in tensors) * 8 / max(weights, 1),
        weights,
        sum(file.stat().st_size for file in _files(path)),
    )


def quantized_totals(path: Path) -> Totals:
    """`totals` of a folder that jaxq has made."""
    if is_checkpoint(path):
        return totals(checkpoint_tensors(read_manifest(path), {}), path)
    return totals(hf_tensors(path), path)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file())


def _place(part: str) -> tuple[int, int, str]:
    """Embedding, layers by number, the rest."""
    if part == "embed":
        return 0, 0, part
    number = part.removeprefix("layers_")
    return (1, int(number), part) if number.isdigit() else (2, 0, part)


def _tensor(path: str, entry: ArrayEntry | QTensorEntry, told: Mapping[str, Any]) -> Tensor:
    if isinstance(entry, ArrayEntry):
        return Tensor(path, entry.shape, entry.dtype, entry.nbytes)
    nbytes = sum(field.nbytes for field in entry.fields.values())
    return Tensor(path, entry.shape, _format(entry.spec), nbytes, True, told)


def _stored(tensor: StoredTensor) -> Tensor:
    if tensor.scheme is None:
        return Tensor(tensor.path, tensor.shape, str(tensor.dtype), tensor.nbytes)
    # Of a spec that is shown, the scales' dtype is not.
    dtype = _format(tensor.scheme.spec("bfloat16"))
    return Tensor(tensor.path, tensor.shape, dtype, tensor.nbytes, True)


def _format(spec: QuantSpec) -> str:
    """ "int4 g128"."""
    size = "" if spec.group_size == -1 else f" g{spec.group_size}"
    act = "" if spec.activation is None else f", {spec.activation.dtype} activations"
    return f"{spec.dtype}{size}{act}"
