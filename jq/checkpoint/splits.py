"""Large arrays that one process writes, in pieces that many can read.

Orbax takes a shard for its chunk, and one process has the whole array.  The axis along which the
devices of a mesh would share the array (`jq.cuts`) is therefore stored as two, [.., pieces, size /
pieces, ..]: of an axis that is named to it Orbax makes chunks of size one.  In memory that is
another view of the same bytes, before writing as after reading, on the host and on a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.cuts import CutRule, Weight, axis_of_field, misfit
from jq.qtensor import QTensor

# As many as there are devices in most machines; 2 and 4 of them take several pieces each.
PIECES = (8, 4, 2)
# Arrays below stay whole: each piece costs a file and a digest.
MIN_BYTES = 512 * 1024


@dataclasses.dataclass(frozen=True)
class SplitArray:
    """An array that is stored in pieces.

    array: [.., pieces, size / pieces, ..], as it is stored.
    axis: that of the pieces.
    """

    array: np.ndarray
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array itself."""
        at, shape = self.axis, self.array.shape
        return (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Of a piece of it."""
        at, shape = self.axis, self.array.shape
        return (*shape[:at], *shape[at + 1 :])

    @property
    def chunks(self) -> list[np.ndarray]:
        """The pieces, in order; views."""
        return list(np.moveaxis(self.array, self.axis, 0))


def plan(path: str, leaf: Any, rule: CutRule) -> Mapping[str, tuple[int, int]]:
    """Which arrays of a leaf are stored in pieces: (axis, pieces), by path.

    Args:
      path: the leaf's.
      leaf: an array, or a QTensor, whose pieces are what shards may be.
      rule: that of the model; what it would not cut has its last axis in pieces.
    """
    if isinstance(leaf, QTensor):
        return _plan_fields(path, leaf, rule)
    shape = _shape(leaf)
    axis = rule.of_array(path, shape)
    axis = len(shape) - 1 if axis is None else axis
    pieces = next((p for p in PIECES if len(shape) > 1 and shape[axis] % p == 0), None)
    return {} if pieces is None else {path: (axis, pieces)}


def _plan_fields(path: str, w: QTensor, rule: CutRule) -> Mapping[str, tuple[int, int]]:
    by_inputs = rule.by_inputs(path, Weight.of(w))

    def fits(pieces: int) -> bool:
        cuts = (pieces, 1) if by_inputs else (1, pieces)
        return misfit(w.spec, w.k, w.n, *cuts, tiled=False) is None

    pieces = next(filter(fits, PIECES), None)
    found = {}
    for field in ("codes", "scale", "zero_point") if pieces else ():
        shape = _shape(getattr(w, field))
        axis = axis_of_field(field, shape, by_inputs=by_inputs) if len(shape) > 1 else None
        if axis is not None:
            found[f"{path}/{field}"] = (axis, pieces)
    return found


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", ()))  # what is no array at all is refused afterwards


def split(array: np.ndarray, axis: int, pieces: int) -> np.ndarray | SplitArray:
    """A C-contiguous array in so many pieces; whole if it is small, or is not what was planned."""
    if array.nbytes < MIN_BYTES or array.shape[axis] % pieces:
        return array  # what a QTensor's arrays have to be is checked with the others
    shape = (*array.shape[:axis], pieces, array.shape[axis] // pieces, *array.shape[axis + 1 :])
    return SplitArray(array.reshape(shape), axis)
