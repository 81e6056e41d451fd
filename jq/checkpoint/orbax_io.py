"""Orbax, behind one door: a nested dict of arrays in, the same out, of NumPy.

Plain files (no OCDBT), Zarr v2, no compression: quantized weights do not compress, the size of
every file is known beforehand, and equal inputs give equal files, which OCDBT's random file names
do not allow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jq import tree

STATE = "state"
_METADATA = "_CHECKPOINT_METADATA"
_COMMITTED = "commit_success.txt"


def save_tree(
    folder: Path,
    arrays: Mapping[str, Any],
    axes: Mapping[str, int] | None = None,
    *,
    jointly: bool = False,
) -> None:
    """Write a nested dict of arrays (none of size zero) as an Orbax checkpoint.

    Args:
      folder: to be made.
      arrays: NumPy arrays, and where all processes save jointly, jax.Arrays that lie on several.
      axes: for the NumPy arrays that are stored in chunks of size one along an axis, which one, by
        slash-separated path.
      jointly: all processes of the program are here, with the same tree, and the same number of
        operations behind them (see `catch_up`): each writes the shards that it has, and process 0
        the NumPy arrays. Otherwise nobody waits for anybody.
    """
    ocp = _orbax()
    context = _context(ocp, jointly=jointly)
    storage_options = context.array.saving.StorageOptions

    def options(key: Any, value: Any) -> Any:
        axis = (axes or {}).get("/".join(str(step.key) for step in key))
        return None if axis is None else storage_options(shard_axes=(axis,))

    context.array.saving.scoped_storage_options_creator = options
    context.memory.deepcopy_host_arrays = False  # nobody changes them before this returns
    with _quiet(), context:
        ocp.save(folder, dict(arrays), checkpointable_name=STATE)


def operations() -> int:
    """How many operations Orbax counts in this process."""
    return int(_counter().get_current_operation_id())


def catch_up(count: int) -> None:
    """Let Orbax count on to `count` operations.

    Its processes wait for each other by number, and one that has read or written something alone
    would wait for ever.
    """
    while operations() < count:
        _counter().next_operation_id()


def _counter() -> Any:
    from orbax.checkpoint._src.futures import synchronization

    return synchronization.OperationIdGenerator


def stored_arrays(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every stored array, by slash-separated path, from Orbax's metadata."""
    ocp = _orbax()
    with _quiet(), _context(ocp):
        found = ocp.metadata(_plain(folder), checkpointable_name=STATE).metadata
    return {path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in tree.leaves(found)}


def load_tree(folder: Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arrays that `target`, a nested dict of what `abstract` gives, names.

    They are NumPy arrays, and jax.Arrays where the target has a sharding. Of those, this process
    reads the chunks that its own devices need, each once.
    """
    ocp = _orbax()
    with _quiet(), _context(ocp):
        return ocp.load(_plain(folder), dict(target), checkpointable_name=STATE)


def _plain(folder: Path) -> Path:
    """The folder without `..`, behind which Orbax finds nothing."""
    return Path(os.path.realpath(folder))


def abstract(dtype: Any, shape: tuple[int, ...], sharding: Sharding | None = None) -> Any:
    """A target for `load_tree` that takes no memory."""
    if sharding is not None:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return np.broadcast_to(np.zeros((), dtype), shape)


def _orbax() -> Any:
    try:  # the v1 API moves to the top at Orbax 1.0
        import orbax.checkpoint.v1 as ocp  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        import orbax.checkpoint.experimental.v1 as ocp
    return ocp


def _context(ocp: Any, *, jointly: bool = False) -> Any:
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False
    if jointly:
        # Chunks are the shards, and nothing tells of devices that a reader need not have. Naming
        # the processes makes their barriers ones with a timeout.
        context.array.saving.use_replica_parallel = False
        context.array.saving.enable_write_sharding_file = False
        context.multiprocessing.active_processes = set(range(jax.process_count()))
        context.multiprocessing.barrier_sync_key_prefix = "jaxq"
    elif jax.process_count() > 1:
        # Each process saves and loads for itself: no barrier may wait for the others.
        me = jax.process_index()
        context.multiprocessing.active_processes = {me}
        context.multiprocessing.primary_host = me
        context.multiprocessing.barrier_sync_key_prefix = f"jaxq{me}"
    return context


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax's log lines away while it works for us.

    It warns about the absence of OCDBT, which is on purpose, and prints the traceback of every
    failure that it also raises.
    """
    logger, only_others = logging.getLogger("absl"), _NotOrbax()
    logger.addFilter(only_others)
    try:
        yield
    finally:
        logger.removeFilter(only_others)


def forget_time_and_place(folder: Path) -> None:
    """Take the clock and the folder's name out of a saved tree: equal inputs give equal files."""
    metadata = folder / _METADATA
    facts = json.loads(metadata.read_text())
    metadata.write_text(
        json.dumps({**facts, "init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0})
    )
    committed = folder / _COMMITTED
    if committed.exists():
        committed.write_text("Checkpoint commit was successful")
