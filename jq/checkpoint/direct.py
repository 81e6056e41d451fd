"""Arrays that go from the disk to their devices: each process reads and verifies what it holds.

That takes a digest for each chunk, and shards that are made of whole chunks.  All other arrays are
read whole, and verified, on the host.  Where the axis of the chunks is stored as two, that of the
pieces is given to the mesh, and each device joins its own: they lie in its memory as they have to.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jq.checkpoint.digests import array_digest
from jq.checkpoint.format import ArrayEntry
from jq.checkpoint.shards import chunk_slices
from jq.errors import CheckpointError

_AUTO = (AxisType.Auto,)


def direct_sharding(path: str, entry: ArrayEntry, sharding: Any) -> Sharding | None:
    """`sharding` where an array can be restored straight into it, and this saves reading.

    An axis that is stored as two takes a NamedSharding, in its devices' own memory.
    Raises: CheckpointError where it does not divide an array that has chunks.
    """
    if not entry.chunks or not isinstance(sharding, Sharding) or sharding.is_fully_replicated:
        return None
    with misfits(path, entry.shape, sharding):
        sharding.shard_shape(entry.shape)
    if entry.split is not None and not _is_plain(sharding):
        return None
    indices = sharding.addressable_devices_indices_map(entry.shape).values()
    return sharding if all(_is_whole(entry, index) for index in indices) else None


def _is_plain(sharding: Sharding) -> bool:
    kinds = {device.default_memory().kind for device in sharding.addressable_devices}
    return isinstance(sharding, NamedSharding) and sharding.memory_kind in (None, *kinds)


def _is_whole(entry: ArrayEntry, index: Any) -> bool:
    """Whether a shard is made of whole chunks."""
    bounds = (cut.indices(size) for cut, size in zip(index, entry.shape, strict=True))
    return all(
        step == 1 and start % chunk == 0 and stop % chunk == 0
        for (start, stop, step), chunk in zip(bounds, entry.chunk_shape, strict=True)
    )


def stored_sharding(entry: ArrayEntry, sharding: Sharding) -> Sharding:
    """That of the array as it is stored, for one that `direct_sharding` gave."""
    if entry.split is None or not isinstance(sharding, NamedSharding):
        return sharding
    axes = (*sharding.spec, *(None,) * (len(entry.shape) - len(sharding.spec)))
    at = entry.split + 1
    return NamedSharding(sharding.mesh, P(*axes[:at], None, *axes[at:]))


def joined(entry: ArrayEntry, stored: jax.Array, sharding: Sharding) -> jax.Array:
    """The array of an entry with a split, whose shards are whole pieces; `stored` is used up.

    Nothing is moved: each process runs a program on its own devices, in which each device gives
    another shape to what it has.
    """
    if (at := entry.split) is None:
        return stored
    shards = [shard.data for shard in stored.addressable_shards]
    mesh = Mesh(np.array([next(iter(s.devices())) for s in shards]), ("own",), axis_types=_AUTO)
    shape = list(shards[0].shape)
    shape[at] *= len(shards)
    lie = NamedSharding(mesh, P(*(None,) * at, "own"))
    made = _joiner(lie, at)(jax.make_array_from_single_device_arrays(tuple(shape), lie, shards))
    own = [shard.data for shard in made.addressable_shards]
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, own)


@functools.lru_cache(maxsize=64)
def _joiner(lie: NamedSharding, at: int) -> Any:
    """The program that makes one of two axes, of arrays that lie on one process's devices."""

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])

    local = jax.shard_map(join, mesh=lie.mesh, in_specs=lie.spec, out_specs=lie.spec)
    return jax.jit(local, donate_argnums=0)


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
