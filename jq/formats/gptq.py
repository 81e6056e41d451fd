"""GPTQ files: `qweight`, `qzeros`, `scales`, `g_idx` of a linear (AutoGPTQ, GPTQModel, vLLM, ...).

    qweight  int32 [K * bits/32, N]    packed along the inputs
    qzeros   int32 [G, N * bits/32]    packed along the outputs
    scales   float16 [G, N]
    g_idx    int32 [K]                 the group of each input; without act order k // group_size

W[k, n] = (q[k, n] - zero[g_idx[k], n]) * scale[g_idx[k], n].

The quirk of the format, which nothing but `_zeros` and `_qzeros` knows: checkpoint_format "gptq"
(v1) stores zero - 1 in place of the zero.  A zero of 0 wraps to 2**bits - 1, within its own bits;
but GPTQModel subtracts from whole words, where it borrows from the next field (`borrow`).  Readers
disagree about v1 files with zeros of 0; `checkpoint_format="gptq_v2"` stores zeros as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from jq.errors import CheckpointError, SpecError
from jq.formats import words
from jq.formats.arrays import (
    Arrays,
    cast_scales,
    check_kind,
    group_order,
    groups_of,
    make_qtensor,
    packed_codes,
    scale_dtype,
    take,
    take_scales,
    zeros_of,
)
from jq.qtensor import QTensor
from jq.spec import QuantSpec, ScaleDtype, check_group_size

BITS = (2, 3, 4, 8)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")

CheckpointFormat = Literal["gptq", "gptq_v2"]


@dataclasses.dataclass(frozen=True)
class GPTQScheme:
    """How one linear is stored; fields as in `quantization_config`.

    bits: 2, 3, 4 or 8.
    group_size: inputs that share a scale; -1 is all of them.
    sym: every zero is 2**(bits - 1); linears whose zeros say otherwise are refused.
    desc_act: `g_idx` may be a permutation's.
    checkpoint_format: "gptq" (v1) or "gptq_v2".
    borrow: v1 zeros were decremented in whole words (GPTQModel; of 2, 4 and 8 bits).
    scale_dtype: of the scales written; scales read keep theirs.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: CheckpointFormat = "gptq"
    borrow: bool = False
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SpecError(f"GPTQ files have {', '.join(map(str, BITS))} bits, not {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise SpecError(f"group_size {self.group_size} is neither positive nor -1")

    def spec(self, scale_dtype: ScaleDtype) -> QuantSpec:
        """The format of the QTensor."""
        return QuantSpec(f"int{self.bits}", self.group_size, self.sym, scale_dtype=scale_dtype)


def scheme_for(
    spec: QuantSpec, path: str = "weight", *, desc_act: bool = False, v2: bool = False
) -> GPTQScheme:
    """The scheme that stores QTensors of a spec.

    Raises: SpecError naming what GPTQ files cannot say.
    """
    if spec.is_float or spec.bits not in BITS or spec.granularity not in ("group", "channel"):
        raise SpecError(
            f"{path}: GPTQ files hold int2, int3, int4 and int8 weights with a scale per group or "
            f"output, not {spec.dtype} per {spec.granularity}; use compressed-tensors"
        )
    if spec.activation is not None:
        raise SpecError(
            f"{path}: GPTQ files cannot say that activations are quantized "
            f"({spec.activation.dtype}); use compressed-tensors"
        )
    version = "gptq_v2" if v2 else "gptq"
    return GPTQScheme(spec.bits, spec.group_size, spec.symmetric, desc_act, version)


def to_qtensor(tensors: Arrays, scheme: GPTQScheme, shape: tuple[int, int], path: str) -> QTensor:
    """The QTensor of one linear, bit for bit; act order becomes `order`.

    Args:
      tensors: arrays by suffix (`SUFFIXES`; `g_idx` may be missing without act order).
      scheme: how they are stored.
      shape: (K, N).
      path: of the linear, for messages.
    Returns: a QTensor with NumPy leaves.
    Raises: CheckpointError naming the tensor that disagrees with the scheme or is out of range.
    """
    k, n = shape
    spec = scheme.spec("float16")
    check_group_size(k, k if scheme.group_size == -1 else scheme.group_size, path)
    groups = spec.num_groups(k)
    why = f"bits is {scheme.bits}, group_size {scheme.group_size}, and the linear {k} x {n}"
    height, width = words.num_words(k, scheme.bits), words.num_words(n, scheme.bits)
    qweight = take(tensors, "qweight", path, (height, n), np.int32, why)
    qzeros = take(tensors, "qzeros", path, (groups, width), np.int32, why)
    scale = take_scales(tensors, "scales", path, (groups, n), why)
    order = _order(tensors, scheme, k, path, why)
    zeros = _zeros(qzeros, scheme, n)
    if scheme.sym:
        _check_symmetric(zeros, spec.zero_offset, scheme, path)
    packed = words.to_bytes(qweight, scheme.bits, k, 0)
    return make_qtensor(
        packed, scale, None if scheme.sym else zeros, scheme.spec(scale_dtype(scale)), shape, order
    )


def from_qtensor(w: QTensor, scheme: GPTQScheme, path: str) -> dict[str, np.ndarray]:
    """The arrays of one linear by suffix: the inverse of `to_qtensor`.

    Raises: SpecError for a QTensor that is not of the scheme, has an order although desc_act is
      false, or scales that are no numbers of `scheme.scale_dtype`.
    """
    check_kind(w, scheme.spec(w.spec.scale_dtype), path, "the GPTQ scheme")
    size = w.k if scheme.group_size == -1 else scheme.group_size
    if w.order is not None and not scheme.desc_act:
        raise SpecError(
            f"{path}: has an act order, but desc_act is false; write it with desc_act=True"
        )
    order = np.arange(w.k) if w.order is None else np.asarray(w.order)
    return {
        "qweight": words.from_bytes(packed_codes(w), scheme.bits, w.k, 0),
        "qzeros": _qzeros(zeros_of(w), scheme),
        "scales": cast_scales(w, scheme.scale_dtype, path, "the GPTQ file"),
        "g_idx": groups_of(order, size),
    }


def has_zero_of_zero(w: QTensor) -> bool:
    """Whether a v1 file of this QTensor would be read differently by different tools."""
    return bool((zeros_of(w) == 0).any())


def _order(tensors: Arrays, scheme: GPTQScheme, k: int, path: str, why: str) -> np.ndarray | None:
    if "g_idx" not in tensors:
        if scheme.desc_act:
            raise CheckpointError(
                f"{path}.g_idx is missing, but desc_act is true: the order of the inputs is lost; "
                "download the checkpoint again"
            )
        return None
    g_idx = take(tensors, "g_idx", path, (k,), np.int32, why)
    size = k if scheme.group_size == -1 else scheme.group_size
    order = group_order(g_idx, size, k, f"{path}.g_idx")
    if order is not None and not scheme.desc_act:
        at = int(np.argmax(g_idx != np.arange(k) // size))
        raise CheckpointError(
            f"{path}.g_idx: input {at} is in group {int(g_idx[at])}, but desc_act is false, which "
            f"says {at // size}; if the file has an act order, set desc_act to true in config.json"
        )
    return order


def _check_symmetric(zeros: np.ndarray, expected: int, scheme: GPTQScheme, path: str) -> None:
    wrong = zeros != expected
    if wrong.any():
        at = [int(i) for i in np.argwhere(wrong)[0]]
        raise CheckpointError(
            f"{path}.qzeros: the zero at {at} is {int(zeros[tuple(at)])}, but sym is true, which "
            f"says {expected} (checkpoint_format {scheme.checkpoint_format!r}); sym or "
            "checkpoint_format in config.json is wrong, or the file is damaged"
        )


def _zeros(qzeros: np.ndarray, scheme: GPTQScheme, n: int) -> np.ndarray:
    """uint8 [G, N] of the stored words."""
    if scheme.checkpoint_format == "gptq_v2":
        return words.unpack(qzeros, scheme.bits, n, 1)
    if _in_words(scheme):
        whole = qzeros.astype(np.int32).view(np.uint32) + _ones(scheme.bits)
        return words.unpack(whole.view(np.int32), scheme.bits, n, 1)
    stored = words.unpack(qzeros, scheme.bits, n, 1)
    return (stored + np.uint8(1)) & np.uint8(2**scheme.bits - 1)


def _qzeros(zeros: np.ndarray, scheme: GPTQScheme) -> np.ndarray:
    """The inverse of `_zeros`."""
    if scheme.checkpoint_format == "gptq_v2":
        return words.pack(zeros, scheme.bits, 1)
    if _in_words(scheme):
        whole = words.pack(zeros, scheme.bits, 1).view(np.uint32) - _ones(scheme.bits)
        return whole.view(np.int32)
    return words.pack((zeros - np.uint8(1)) & np.uint8(2**scheme.bits - 1), scheme.bits, 1)


def _in_words(scheme: GPTQScheme) -> bool:
    return scheme.borrow and scheme.bits != 3


def _ones(bits: int) -> np.uint32:
    """A word with 1 in each field."""
    return np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
