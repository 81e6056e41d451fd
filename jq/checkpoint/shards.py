"""Arrays of a program of several processes, on their way to the disk: each process writes its own.

What lies on the devices of several processes is stored as it lies, a chunk per shard. What every
process has a copy of is cut among them, so that all of them write: along its last axis, or the last
one that so many processes divide. Vectors and what cannot be cut is left to process 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jq.checkpoint.digests import array_digest, in_threads
from jq.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class ShardedArray:
    """An array that is written by several processes.

    array: for Orbax, over all processes.
    chunk_shape: of its shards.
    digests: of the chunks that this process writes, by their place in C order of the grid.
    """

    array: jax.Array
    chunk_shape: tuple[int, ...]
    digests: Mapping[int, str]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def sharded(path: str, leaf: Any) -> ShardedArray | None:
    """A leaf as it will be written by all processes; None where process 0 does.

    Args:
      path: for messages.
      leaf: a jax.Array anywhere, or a NumPy array that is equal in all processes.
    Raises: CheckpointError for an array whose shards differ in shape.
    """
    if isinstance(leaf, jax.Array) and not _is_copied(leaf):
        return _as_it_lies(path, leaf)
    axis = _cut_axis(leaf.shape, jax.process_count())
    if axis is None:
        return None
    whole = np.asarray(leaf)
    spec = P(*(None,) * axis, "process")
    mesh = Mesh(np.array(_first_devices()), ("process",), axis_types=(AxisType.Auto,))
    array = jax.make_array_from_callback(
        whole.shape, NamedSharding(mesh, spec), lambda index: whole[index]
    )
    return _as_it_lies(path, array)


def _is_copied(array: jax.Array) -> bool:
    return array.is_fully_addressable or array.is_fully_replicated


def _first_devices() -> list[Any]:
    devices = {device.process_index: device for device in reversed(jax.devices())}
    return [devices[index] for index in range(jax.process_count())]


def _cut_axis(shape: tuple[int, ...], parts: int) -> int | None:
    if len(shape) < 2 or not math.prod(shape):
        return None
    return next((i for i in reversed(range(len(shape))) if shape[i] % parts == 0), None)


def _as_it_lies(path: str, array: jax.Array) -> ShardedArray:
    chunk = array.sharding.shard_shape(array.shape)
    places = array.sharding.devices_indices_map(array.shape).values()
    sizes = {tuple(len(range(*s.indices(n))) for s, n in _pairs(array, p)) for p in places}
    if sizes != {chunk}:
        raise CheckpointError(
            f"{path}: its shards over {array.sharding} are of different shapes {sorted(sizes)}: "
            "give it a sharding that divides it"
        )
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    digests = in_threads(lambda shard: array_digest(np.asarray(shard.data)), own)
    numbers = [_number(array, chunk, shard.index) for shard in own]
    return ShardedArray(array, chunk, dict(zip(numbers, digests, strict=True)))


def _pairs(array: jax.Array, index: Any) -> list[tuple[slice, int]]:
    return list(zip(index, array.shape, strict=True))


def _number(array: jax.Array, chunk: tuple[int, ...], index: Any) -> int:
    grid = [n // c for n, c in zip(array.shape, chunk, strict=True)]
    place = [(cut.start or 0) // c for cut, c in zip(index, chunk, strict=True)]
    return int(np.ravel_multi_index(place, grid)) if grid else 0


def chunk_slices(shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Where each chunk of an array lies, in C order of the grid."""
    steps = [range(0, n, c) for n, c in zip(shape, chunk, strict=True)]
    return [
        tuple(slice(start, start + c) for start, c in zip(starts, chunk, strict=True))
        for starts in itertools.product(*steps)
    ]
