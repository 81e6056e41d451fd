"""AWQ files, version "gemm": `qweight`, `qzeros`, `scales` of a linear (AutoAWQ, vLLM, TGI, ...).

    qweight  int32 [K, N/8]    packed along the outputs, eight neighbours in AWQ's order
    qzeros   int32 [G, N/8]    the same; zeros as they are
    scales   float16 [G, N]

W[k, n] = (q[k, n] - zero[k // group_size, n]) * scale[k // group_size, n].  What the method does to
activations is folded into the ops before, and is nothing the linear knows of.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jq import packing
from jq.errors import CheckpointError, SpecError
from jq.formats import words
from jq.formats.arrays import (
    Arrays,
    cast_scales,
    check_kind,
    make_qtensor,
    pack_codes,
    packed_codes,
    scale_dtype,
    strips,
    take,
    take_scales,
    unpack_codes,
    zeros_of,
)
from jq.qtensor import QTensor
from jq.spec import QuantSpec, ScaleDtype, check_group_size

BITS = 4
SUFFIXES = ("qweight", "qzeros", "scales")


@dataclasses.dataclass(frozen=True)
class AWQScheme:
    """How one linear is stored; fields as in `quantization_config`.

    group_size: inputs that share a scale; -1 is all of them.
    zero_point: false says that every zero is 8, and that `qzeros` may be missing.
    scale_dtype: of the scales written; scales read keep theirs.
    """

    group_size: int = 128
    zero_point: bool = True
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size < 1:
            raise SpecError(f"group_size {self.group_size} is neither positive nor -1")

    def spec(self, scale_dtype: ScaleDtype) -> QuantSpec:
        """The format of the QTensor."""
        return QuantSpec("int4", self.group_size, not self.zero_point, scale_dtype=scale_dtype)


def scheme_for(spec: QuantSpec, path: str = "weight") -> AWQScheme:
    """The scheme that stores QTensors of a spec; symmetric ones with zeros of 8.

    Raises: SpecError naming what AWQ files cannot say.
    """
    if spec.dtype != "int4":
        raise SpecError(
            f"{path}: AWQ files hold int4 weights, not {spec.dtype}; use gptq or compressed-tensors"
        )
    if spec.granularity not in ("group", "channel"):
        raise SpecError(
            f"{path}: AWQ files have a scale per group or output, not per {spec.granularity}"
        )
    return AWQScheme(spec.group_size, zero_point=True)


def to_qtensor(tensors: Arrays, scheme: AWQScheme, shape: tuple[int, int], path: str) -> QTensor:
    """The QTensor of one linear, bit for bit.

    Args:
      tensors: arrays by suffix (`SUFFIXES`; `qzeros` may be missing when zero_point is false).
      scheme: how they are stored.
      shape: (K, N).
      path: of the linear, for messages.
    Returns: a QTensor with NumPy leaves.
    Raises: CheckpointError naming the tensor that disagrees with the scheme or is out of range.
    """
    k, n = shape
    if n % 8:
        raise CheckpointError(f"{path}: AWQ packs eight outputs in a word, but there are {n}")
    check_group_size(k, k if scheme.group_size == -1 else scheme.group_size, path)
    groups = scheme.spec("float16").num_groups(k)
    why = f"bits is 4, group_size {scheme.group_size}, and the linear {k} x {n}"
    qweight = take(tensors, "qweight", path, (k, n // 8), np.int32, why)
    scale = take_scales(tensors, "scales", path, (groups, n), why)
    zeros = None
    if scheme.zero_point or "qzeros" in tensors:
        zeros = words.unpack_awq(take(tensors, "qzeros", path, (groups, n // 8), np.int32, why))
    if not scheme.zero_point:
        if zeros is not None and (zeros != 8).any():
            raise CheckpointError(
                f"{path}.qzeros: has a zero of {int(zeros[zeros != 8][0])}, but zero_point is "
                "false, which says 8; set zero_point to true in config.json, or the file is damaged"
            )
        zeros = None
    packed = np.empty((packing.packed_size(k, BITS), n), np.uint8)
    for part in strips(k, n, 8):
        codes = words.unpack_awq(qweight[:, part.start // 8 : part.stop // 8])
        packed[:, part] = pack_codes(codes, BITS)
    return make_qtensor(packed, scale, zeros, scheme.spec(scale_dtype(scale)), shape)


def from_qtensor(w: QTensor, scheme: AWQScheme, path: str) -> dict[str, np.ndarray]:
    """The arrays of one linear by suffix: the inverse of `to_qtensor`; `qzeros` always written.

    A symmetric QTensor may be written with zero_point=True: its zeros are all 8.
    Raises: SpecError for a QTensor that is not of the scheme, has an order or a number of outputs
      that 8 does not divide, or scales that are no numbers of `scheme.scale_dtype`.
    """
    wanted = scheme.spec(w.spec.scale_dtype)
    if scheme.zero_point and w.spec.symmetric:
        wanted = dataclasses.replace(wanted, symmetric=True)
    check_kind(w, wanted, path, "the AWQ scheme")
    if w.order is not None:
        raise SpecError(
            f"{path}: AWQ files have no act order; use gptq, or quantize without desc_act"
        )
    if w.n % 8:
        raise SpecError(f"{path}: AWQ packs eight outputs in a word, but there are {w.n}")
    packed = packed_codes(w)
    qweight = np.empty((w.k, w.n // 8), np.int32)
    for part in strips(w.k, w.n, 8):
        codes = unpack_codes(packed[:, part], BITS, w.k)
        qweight[:, part.start // 8 : part.stop // 8] = words.pack_awq(codes)
    return {
        "qweight": qweight,
        "qzeros": words.pack_awq(zeros_of(w)),
        "scales": cast_scales(w, scheme.scale_dtype, path, "the AWQ file"),
    }
