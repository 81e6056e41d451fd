"""An array of one process among several, in a plain file.

Orbax saves in step with all processes, and from their devices. What each has in host memory, and
reads again by itself, needs neither.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jq.checkpoint import files as fs
from jq.checkpoint.digests import array_digest, little_endian
from jq.checkpoint.format import ArrayEntry
from jq.errors import CheckpointError


def write_array(file: Path, array: np.ndarray) -> ArrayEntry:
    """Write the little-endian bytes of an array in C order; they are on the disk when this returns.

    Returns: what `read_array` needs to know.
    Raises: OutputError when there is no room, or the disk refuses.
    """
    array = little_endian(array)
    fs.check_room(file.parent, array.nbytes)
    with fs.output_errors(file), file.open("wb") as stream:
        stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
    return ArrayEntry(array.dtype.name, array.shape, array_digest(array))


def read_array(file: Path, entry: ArrayEntry) -> np.ndarray:
    """The array that `write_array` has written.

    Raises: CheckpointError when the file is not there, or not what was written.
    """
    found = file.stat().st_size if file.is_file() else None
    if found != entry.nbytes:
        what = "is missing" if found is None else f"holds {found} bytes instead of {entry.nbytes}"
        raise CheckpointError(f"{file} {what}")
    array = np.fromfile(file, np.uint8).view(jnp.dtype(entry.dtype)).reshape(entry.shape)
    if (digest := array_digest(array)) != entry.sha256:
        raise CheckpointError(f"{file}: sha256 is {digest} instead of {entry.sha256}")
    return array
