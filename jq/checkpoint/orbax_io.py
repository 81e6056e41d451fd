"""Orbax, behind one door: a nested dict of NumPy arrays in, the same out.

Plain files (no OCDBT), Zarr v2, no compression: quantized weights do not compress, the size of
every file is known beforehand, and equal inputs give equal files, which OCDBT's random file names
do not allow.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jq import tree

STATE = "state"
_METADATA = "_CHECKPOINT_METADATA"
_COMMITTED = "commit_success.txt"


def save_tree(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write a nested dict of NumPy arrays (none of size zero) as an Orbax checkpoint."""
    ocp = _orbax()
    with _quiet(), _context(ocp):
        ocp.save(folder, dict(arrays), checkpointable_name=STATE)
    _forget_time_and_place(folder)


def stored_arrays(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every stored array, by slash-separated path, from Orbax's metadata."""
    ocp = _orbax()
    with _quiet(), _context(ocp):
        found = ocp.metadata(folder, checkpointable_name=STATE).metadata
    return {path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in tree.leaves(found)}


def load_tree(folder: Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arrays that `target` (nested dict of arrays of the right dtype and shape) names."""
    ocp = _orbax()
    with _quiet(), _context(ocp):
        return ocp.load(folder, dict(target), checkpointable_name=STATE)


def abstract(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A target for `load_tree` that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _orbax() -> Any:
    try:  # the v1 API moves to the top at Orbax 1.0
        import orbax.checkpoint.v1 as ocp  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        import orbax.checkpoint.experimental.v1 as ocp
    return ocp


def _context(ocp: Any) -> Any:
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False
    if jax.process_count() > 1:
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


def _forget_time_and_place(folder: Path) -> None:
    """Take out the clock and the folder's name, so that equal inputs give equal files."""
    metadata = folder / _METADATA
    facts = json.loads(metadata.read_text())
    metadata.write_text(
        json.dumps({**facts, "init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0})
    )
    committed = folder / _COMMITTED
    if committed.exists():
        committed.write_text("Checkpoint commit was successful")
