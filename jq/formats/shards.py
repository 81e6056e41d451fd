"""Tensors into safetensors files of a limited size, with the index that Hugging Face tools read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jq.checkpoint.digests import array_digest, in_threads, little_endian
from jq.checkpoint.files import check_room, output_errors
from jq.errors import CheckpointError, SpecError
from jq.models.hf_weights import INDEX, SINGLE
from jq.models.safetensors_file import write_safetensors

SHARD_BYTES = 5_000_000_000
# Room for headers, the index and rounding to file system blocks.
_OVERHEAD = 1_000_000


class ShardWriter:
    """Writes tensors in the order they come; a file is closed when the next would not fit.

    One shard is held in memory at a time. A single shard is called `model.safetensors`; several get
    numbers, and an index that maps tensors to them. A tensor larger than the limit gets a file of
    its own.

    Args:
      folder: an existing folder.
      shard_bytes: limit of a file's tensors.

    Attributes:
      digests: tensor name -> SHA-256 of its little-endian bytes, in hex, of what is written.

    Raises: SpecError for a limit that is not positive.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        if shard_bytes < 1:
            raise SpecError(f"shard size {shard_bytes} is not positive; the usual is {SHARD_BYTES}")
        self.digests: dict[str, str] = {}
        self._folder, self._limit = folder, shard_bytes
        self._held: dict[str, np.ndarray] = {}
        self._held_bytes = self._total = 0
        self._shards: list[tuple[str, ...]] = []

    def add(self, name: str, array: np.ndarray) -> None:
        """Append one tensor, of any layout and byte order.

        Raises: CheckpointError for a name that was there before; OutputError when the disk refuses.
        """
        if name in self._held or name in self.digests:
            raise CheckpointError(f"{name}: was written already; a tensor has one value")
        if self._held and self._held_bytes + array.nbytes > self._limit:
            self._flush()
        self._held[name] = little_endian(array)
        self._held_bytes += array.nbytes
        self._total += array.nbytes

    def finish(self) -> tuple[str, ...]:
        """Write what is left and the index; returns the weight files' names."""
        if self._held or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = [SINGLE]
        with output_errors(self._folder):
            for i, name in enumerate(names):
                self._draft(i).rename(self._folder / name)
            if count > 1:
                weight_map = {
                    tensor: name
                    for name, shard in zip(names, self._shards, strict=True)
                    for tensor in shard
                }
                index = {
                    "metadata": {"total_size": self._total},
                    "weight_map": dict(sorted(weight_map.items())),
                }
                text = json.dumps(index, indent=2) + "\n"
                (self._folder / INDEX).write_text(text, encoding="utf-8")
        return tuple(names)

    def _flush(self) -> None:
        check_room(self._folder, self._held_bytes + _OVERHEAD)
        with output_errors(self._folder):
            write_safetensors(self._draft(len(self._shards)), self._held, {"format": "pt"})
        digests = in_threads(array_digest, self._held.values())
        self.digests.update(zip(self._held, digests, strict=True))
        self._shards.append(tuple(self._held))
        self._held, self._held_bytes = {}, 0

    def _draft(self, number: int) -> Path:
        """A shard's name while their count is not known."""
        return self._folder / f"shard-{number:05}.safetensors"
