"""Arrays that go from the disk to their devices: each process reads and verifies what it holds.

That takes a digest for each chunk, and shards that are made of whole chunks.  All other arrays are
read whole, and verified, on the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jq.checkpoint.digests import array_digest
from jq.checkpoint.format import ArrayEntry
from jq.checkpoint.shards import chunk_slices
from jq.errors import CheckpointError


def direct_sharding(path: str, entry: ArrayEntry, sharding: Any) -> Sharding | None:
    """`sharding` where an array can be restored straight into it, and this saves reading.

    Raises: CheckpointError where it does not divide an array that has chunks.
    """
    if not entry.chunks or not isinstance(sharding, Sharding) or sharding.is_fully_replicated:
        return None
    with misfits(path, entry.shape, sharding):
        sharding.shard_shape(entry.shape)
    indices = sharding.addressable_devices_indices_map(entry.shape).values()
    return sharding if all(_is_whole(entry, index) for index in indices) else None


def _is_whole(entry: ArrayEntry, index: Any) -> bool:
    """Whether a shard is made of whole chunks."""
    bounds = (cut.indices(size) for cut, size in zip(index, entry.shape, strict=True))
    return all(
        step == 1 and start % chunk == 0 and stop % chunk == 0
        for (start, stop, step), chunk in zip(bounds, entry.chunk_shape, strict=True)
    )


def chunk_digests(entry: ArrayEntry, array: jax.Array) -> Iterator[tuple[str, str]]:
    """(found, wanted) of every chunk on this process's devices, one replica of each."""
    shards = {str(shard.index): shard for shard in array.addressable_shards}
    for shard in shards.values():
        data = np.asarray(shard.data)
        origin = [cut.start or 0 for cut in shard.index]
        for place in chunk_slices(data.shape, entry.chunk_shape):
            at = [
                (start + cut.start) // chunk
                for start, cut, chunk in zip(origin, place, entry.chunk_shape, strict=True)
            ]
            number = int(np.ravel_multi_index(at, entry.grid))
            yield array_digest(data[place]), entry.chunks[number]


@contextlib.contextmanager
def misfits(path: str, shape: tuple[int, ...], sharding: Any) -> Iterator[None]:
    """Turn JAX's refusal of a sharding into a CheckpointError."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"{path}: shape {list(shape)} does not go with {sharding}: {error}"
        ) from error
