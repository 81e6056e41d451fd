"""What the formats share: checking the arrays of one linear, and making a QTensor of them.

Everything is NumPy on the host, and so are the leaves of the QTensors made here: the reader decides
where they go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jq.errors import CheckpointError, SpecError
from jq.formats import words
from jq.qtensor import QTensor
from jq.spec import QuantSpec

if TYPE_CHECKING:
    from jaxtyping import UInt8

Arrays = Mapping[str, np.ndarray]

# Codes that are unpacked at a time.
_STRIP = 2**20

SCALE_DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def take(
    tensors: Arrays, name: str, path: str, shape: Sequence[int], dtype: Any, why: str
) -> np.ndarray:
    """The array `name` of a linear, which must have this shape and dtype.

    `why` says what the shape follows from; it ends the message.
    Raises: CheckpointError naming the tensor and both values.
    """
    if name not in tensors:
        raise CheckpointError(f"{path}.{name} is missing: {why}; download the checkpoint again")
    array = tensors[name]
    check_shape(array, shape, f"{path}.{name}", why)
    if array.dtype.newbyteorder("=") != np.dtype(dtype):
        raise CheckpointError(f"{path}.{name}: dtype {array.dtype}, expected {np.dtype(dtype)}")
    return array.astype(dtype, copy=False)  # the host's byte order


def check_shape(array: np.ndarray, shape: Sequence[int], name: str, why: str) -> None:
    """Raise CheckpointError unless the array has this shape."""
    if array.shape != tuple(shape):
        raise CheckpointError(
            f"{name}: shape {list(array.shape)}, expected {list(shape)}, since {why}: config.json "
            "and the tensors disagree; get both from the same place"
        )


def take_scales(
    tensors: Arrays, name: str, path: str, shape: Sequence[int], why: str
) -> np.ndarray:
    """`take` for scales: of one of the three float dtypes, finite and positive."""
    stored = tensors[name].dtype.newbyteorder("=") if name in tensors else np.dtype(np.float16)
    if stored not in SCALE_DTYPES.values():
        raise CheckpointError(
            f"{path}.{name}: scales are {stored}; known: {', '.join(SCALE_DTYPES)}"
        )
    scale = take(tensors, name, path, shape, stored, why)
    bad = ~(np.isfinite(scale) & (scale.astype(np.float32) > 0))
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CheckpointError(
            f"{path}.{name}: {int(bad.sum())} of {scale.size} scales are no positive numbers, the "
            f"first {float(scale[first])} at {list(first)}: the file is damaged or was made badly; "
            "quantize the original model again"
        )
    return scale


def scale_dtype(scale: np.ndarray) -> Any:
    """The name of a scale's dtype, as `QuantSpec` has it."""
    return next(name for name, dtype in SCALE_DTYPES.items() if dtype == scale.dtype)


def group_order(g_idx: np.ndarray, group_size: int, k: int, name: str) -> np.ndarray | None:
    """Act order of a `g_idx`: int32 [K], the inputs sorted by group, each group's in their order.

    None where the groups are in order already.
    Raises: CheckpointError for groups that are out of range or not all `group_size` inputs large.
    """
    groups = k // group_size
    outside = (g_idx < 0) | (g_idx >= groups)
    if outside.any():
        at = int(np.argmax(outside))
        raise CheckpointError(
            f"{name}: input {at} is in group {int(g_idx[at])}, but {k} inputs in groups of "
            f"{group_size} make groups 0 to {groups - 1}: the file is damaged; download it again"
        )
    sizes = np.bincount(g_idx, minlength=groups)
    if (sizes != group_size).any():
        at = int(np.argmax(sizes != group_size))
        raise CheckpointError(
            f"{name}: group {at} has {int(sizes[at])} inputs, but the group size is {group_size}: "
            "groups of unequal size cannot be read; quantize the original model again"
        )
    if np.array_equal(g_idx, np.arange(k) // group_size):
        return None
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def groups_of(order: np.ndarray, group_size: int) -> np.ndarray:
    """The inverse of `group_order`: int32 [K], the group of each input."""
    g_idx = np.empty(order.shape[0], np.int32)
    g_idx[order] = np.arange(order.shape[0], dtype=np.int32) // group_size
    return g_idx


def make_qtensor(
    packed: UInt8[np.ndarray, "_ N"],
    scale: np.ndarray,
    zeros: np.ndarray | None,
    spec: QuantSpec,
    shape: tuple[int, int],
    order: np.ndarray | None = None,
    input_scale: np.ndarray | None = None,
) -> QTensor:
    """A QTensor with NumPy leaves.

    Args:
      packed: integer codes as `jq.packing` packs them, rows in the order of the inputs; they are
        reordered here where there is an `order`.
      scale: [G, N] as `spec.scale_shape` says.
      zeros: uint8 of the scale's shape, None when symmetric.
      shape: (K, N).
    """
    k, n = shape
    if order is not None:
        packed = _take_rows(packed, order, spec.bits)
    codes = (packed ^ np.uint8(128)).view(np.int8) if _signed(spec) else packed
    zero_point = None if zeros is None else pack_codes(np.ascontiguousarray(zeros.T), spec.bits).T
    scale = np.ascontiguousarray(scale)
    if zero_point is not None:
        zero_point = np.ascontiguousarray(zero_point)
    return _qtensor(codes, scale, zero_point, order, input_scale, spec, k, n)


def float_qtensor(
    codes: np.ndarray,
    scale: np.ndarray,
    spec: QuantSpec,
    input_scale: np.ndarray | None = None,
) -> QTensor:
    """A QTensor of float8 codes [K, N], with NumPy leaves."""
    k, n = codes.shape
    scale = np.ascontiguousarray(scale)
    return _qtensor(np.ascontiguousarray(codes), scale, None, None, input_scale, spec, k, n)


def packed_codes(w: QTensor) -> UInt8[np.ndarray, "_ N"]:
    """The codes of an integer QTensor as `jq.packing` packs them, rows in the order of the inputs.

    The inverse of what `make_qtensor` does with `packed`.
    """
    codes = np.asarray(w.codes)
    packed = codes.view(np.uint8) ^ np.uint8(128) if _signed(w.spec) else codes
    if w.order is None:
        return packed
    return _take_rows(packed, np.argsort(np.asarray(w.order)), w.spec.bits)


def zeros_of(w: QTensor) -> UInt8[np.ndarray, "G N"]:
    """Zero points uint8 of the scale's shape; the implicit one of a symmetric grid too."""
    shape = w.scale.shape
    if w.zero_point is None:
        return np.full(shape, w.spec.zero_offset, np.uint8)
    packed = np.ascontiguousarray(np.asarray(w.zero_point).T)
    return np.ascontiguousarray(unpack_codes(packed, w.spec.bits, shape[-1]).T)


def pack_codes(codes: UInt8[np.ndarray, "K N"], bits: int) -> UInt8[np.ndarray, "_ N"]:
    """`jq.packing.pack` along the first axis, on the host."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    return words.to_bytes(words.pack(codes, bits, 0), bits, codes.shape[0], 0)


def unpack_codes(packed: UInt8[np.ndarray, "_ N"], bits: int, k: int) -> UInt8[np.ndarray, "K N"]:
    """`jq.packing.unpack` along the first axis, on the host."""
    if bits == 8:
        return packed
    return words.unpack(words.from_bytes(packed, bits, k, 0), bits, k, 0)


def strips(k: int, n: int, step: int = 1) -> Iterator[slice]:
    """Slices of the N outputs of a weight that are converted one after the other.

    What is unpacked on the way then takes a megabyte and not a byte per weight.  All but the last
    are a multiple of `step` wide.
    """
    width = max(_STRIP // max(k, 1) // step, 1) * step
    return (slice(start, min(start + width, n)) for start in range(0, n, width))


def _take_rows(
    packed: UInt8[np.ndarray, "_ N"], rows: np.ndarray, bits: int
) -> UInt8[np.ndarray, "_ N"]:
    """Packed codes of the rows in this order."""
    out = np.empty_like(packed)
    k, n = rows.shape[0], packed.shape[1]
    for part in strips(k, n):
        out[:, part] = pack_codes(unpack_codes(packed[:, part], bits, k)[rows], bits)
    return out


def check_kind(w: QTensor, spec: QuantSpec, path: str, what: str) -> None:
    """Raise SpecError unless a QTensor is one matrix of this spec."""
    if w.ndim != 2:
        raise SpecError(f"{path}: is stacked, {list(w.shape)}; write one linear at a time")
    if w.spec != spec:
        raise SpecError(f"{path}: is {w.spec}, but {what} says {spec}")


def cast_scales(w: QTensor, dtype: str, path: str, what: str) -> np.ndarray:
    """The scales [G, N] in the dtype that a file has, where that is exact.

    Raises: SpecError where it is not: other scales would be other weights.
    """
    scale = np.asarray(w.scale)
    with np.errstate(over="ignore"):
        cast = scale.astype(SCALE_DTYPES[dtype])
    changed = cast.astype(np.float64) != scale.astype(np.float64)
    if changed.any():
        worst = float(np.asarray(scale, np.float64)[changed][0])
        raise SpecError(
            f"{path}: {what} stores scales as {dtype}, which does not hold {worst!r} of the "
            f"{scale.dtype} scales exactly; quantize with scale_dtype={dtype!r}"
        )
    return np.ascontiguousarray(cast)


def _signed(spec: QuantSpec) -> bool:
    return spec.bits == 8 and spec.symmetric and not spec.is_float


def _qtensor(*fields: Any) -> QTensor:
    return QTensor(*fields)
