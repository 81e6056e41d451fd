"""compressed-tensors files (llm-compressor, vLLM, SGLang): one linear.

pack-quantized (weights only, 2 to 8 bits):
    weight_packed      int32 [N, K * bits/32]    packed along the inputs, codes + 2**(bits-1)
    weight_scale       [N, G]
    weight_zero_point  int32 [N * bits/32, G]    packed along the outputs, zeros + 2**(bits-1)
    weight_shape       int64 [2] = (N, K)
    weight_g_idx       int32 [K]                 with act order of the kind "group"

int-quantized, float-quantized, naive-quantized:
    weight             int8 or float8_e4m3fn [N, K]
    weight_scale       [N, G], [N, 1], [N/b, K/b] for blocks, [1] or [] per tensor
    weight_zero_point  int8 of the scale's shape, when asymmetric
    input_scale        [1] or [], with static activations

W[n, k] = (q[n, k] - zero) * scale.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jq.errors import CheckpointError, SpecError
from jq.formats import words
from jq.formats.arrays import (
    SCALE_DTYPES,
    Arrays,
    check_kind,
    check_shape,
    float_qtensor,
    group_order,
    groups_of,
    make_qtensor,
    pack_codes,
    packed_codes,
    scale_dtype,
    take,
    take_scales,
    unpack_codes,
    zeros_of,
)
from jq.qtensor import QTensor
from jq.spec import ActivationSpec, QuantSpec, ScaleDtype, WeightGranularity, check_group_size

PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
PLAIN = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")

Format = Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"]
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class CompressedTensorsScheme:
    """How one linear is stored; fields as in a config group's `weights`.

    format: the group's, or the whole config's.
    num_bits, type: of the weights; "float" is float8_e4m3fn, 8 bits.
    strategy: what shares a scale: "group", "channel", "tensor" or "block".
    group_size: inputs in a group, and both sides of a block; -1 otherwise.
    symmetric: no zero points.
    act_order: the linear has a `weight_g_idx` (actorder "group").
    activation: of the group's `input_activations`.
    """

    format: Format = "pack-quantized"
    num_bits: int = 4
    type: Literal["int", "float"] = "int"
    strategy: WeightGranularity = "group"
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        if self.strategy in ("channel", "tensor"):
            object.__setattr__(self, "group_size", -1)
        if self.type == "float" and (self.num_bits != 8 or self.format == "pack-quantized"):
            raise SpecError(
                f"float weights of {self.num_bits} bits in {self.format} are not known; "
                "float8_e4m3fn is, in float-quantized and naive-quantized"
            )
        if self.format == "float-quantized" and self.type == "int":
            raise SpecError("float-quantized weights have the type 'float', not 'int'")
        if self.format == "int-quantized" and self.type == "float":
            raise SpecError("int-quantized weights have the type 'int', not 'float'")
        if self.act_order and (self.format != "pack-quantized" or self.strategy != "group"):
            raise SpecError(f"{self.format} per {self.strategy} has no weight_g_idx")
        self.spec("bfloat16")

    def spec(self, scale_dtype: ScaleDtype) -> QuantSpec:
        """The format of the QTensor."""
        return QuantSpec(
            "float8_e4m3fn" if self.type == "float" else f"int{self.num_bits}",
            self.group_size,
            self.symmetric,
            self.strategy,
            scale_dtype,
            self.activation,
        )


def scheme_for(
    spec: QuantSpec, path: str = "weight", *, act_order: bool = False
) -> CompressedTensorsScheme:
    """The scheme that llm-compressor would store QTensors of a spec in.

    Weights alone are pack-quantized (fp8: naive-quantized), with 8-bit activations int-quantized
    and float-quantized.
    Raises: SpecError naming what the formats cannot say.
    """
    if spec.granularity == "tensor" and not spec.is_float and spec.activation is None:
        raise SpecError(
            f"{path}: pack-quantized files have a scale per group or output, not per tensor"
        )
    if spec.is_float:
        form = "naive-quantized" if spec.activation is None else "float-quantized"
    else:
        form = "pack-quantized" if spec.activation is None else "int-quantized"
    return CompressedTensorsScheme(
        form,
        spec.bits,
        "float" if spec.is_float else "int",
        spec.granularity,
        spec.group_size,
        spec.symmetric,
        act_order,
        spec.activation,
    )


def to_qtensor(
    tensors: Arrays, scheme: CompressedTensorsScheme, shape: tuple[int, int], path: str
) -> QTensor:
    """The QTensor of one linear, bit for bit; a `weight_g_idx` becomes `order`.

    Args:
      tensors: arrays by suffix (`PACKED` or `PLAIN`).
      scheme: how they are stored.
      shape: (K, N), the inputs first.
      path: of the linear, for messages.
    Returns: a QTensor with NumPy leaves.
    Raises: CheckpointError naming the tensor that disagrees with the scheme or is out of range.
    """
    k, n = shape
    if scheme.group_size != -1:
        check_group_size(k, scheme.group_size, path)
        if scheme.strategy == "block":
            check_group_size(n, scheme.group_size, path, axis="outputs")
    if scheme.format == "pack-quantized":
        return _from_packed(tensors, scheme, k, n, path)
    return _from_plain(tensors, scheme, k, n, path)


def from_qtensor(w: QTensor, scheme: CompressedTensorsScheme, path: str) -> dict[str, np.ndarray]:
    """The arrays of one linear by suffix: the inverse of `to_qtensor`.

    Raises: SpecError for a QTensor that is not of the scheme, or has an order where there is no
      room for one.
    """
    check_kind(w, scheme.spec(w.spec.scale_dtype), path, "the compressed-tensors scheme")
    if w.order is not None and not scheme.act_order:
        raise SpecError(f"{path}: has an act order; write it with act_order=True")
    arrays = _to_packed(w, scheme) if scheme.format == "pack-quantized" else _to_plain(w, scheme)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _from_packed(
    tensors: Arrays, scheme: CompressedTensorsScheme, k: int, n: int, path: str
) -> QTensor:
    bits = scheme.num_bits
    groups = scheme.spec("bfloat16").num_groups(k)
    why = f"num_bits is {bits}, the strategy {_strategy(scheme)}, and the linear {k} x {n}"
    _check_stored_shape(tensors, k, n, path)
    stored = take(tensors, "weight_packed", path, (n, words.num_words(k, bits)), np.int32, why)
    scale = take_scales(tensors, "weight_scale", path, (n, groups), why)
    zeros = None
    if not scheme.symmetric:
        zeros = _packed_zeros(tensors, scheme, (n, groups), path, why)
    elif "weight_zero_point" in tensors:
        raise _unexpected_zeros(path)
    order = None
    if scheme.act_order:
        g_idx = take(tensors, "weight_g_idx", path, (k,), np.int32, "actorder is 'group'")
        order = group_order(g_idx, scheme.group_size, k, f"{path}.weight_g_idx")
    elif "weight_g_idx" in tensors:
        raise CheckpointError(
            f"{path}.weight_g_idx is there, but actorder in config.json is not 'group'; set it, or "
            "download the checkpoint again"
        )
    packed = words.to_bytes(stored, bits, k, 1)
    return make_qtensor(packed, scale.T, zeros, scheme.spec(scale_dtype(scale)), (k, n), order)


def _packed_zeros(
    tensors: Arrays, scheme: CompressedTensorsScheme, shape: tuple[int, int], path: str, why: str
) -> np.ndarray:
    """uint8 [G, N] of the zero points of a packed linear."""
    n, groups = shape
    packed_shape = (words.num_words(n, scheme.num_bits), groups)
    stored = take(tensors, "weight_zero_point", path, packed_shape, np.int32, why)
    return np.ascontiguousarray(words.unpack(stored, scheme.num_bits, n, 0).T)


def _check_stored_shape(tensors: Arrays, k: int, n: int, path: str) -> None:
    name = f"{path}.weight_shape"
    if "weight_shape" not in tensors:
        raise CheckpointError(f"{name} is missing; download the checkpoint again")
    check_shape(tensors["weight_shape"], (2,), name, "it holds two numbers")
    found = [int(size) for size in tensors["weight_shape"]]
    if found != [n, k]:
        raise CheckpointError(f"{name}: says {found}, but the model's linear is {[n, k]}")


def _from_plain(
    tensors: Arrays, scheme: CompressedTensorsScheme, k: int, n: int, path: str
) -> QTensor:
    why = f"the strategy is {_strategy(scheme)} and the linear {k} x {n}"
    dtype = FLOAT8 if scheme.type == "float" else np.dtype(np.int8)
    stored = take(tensors, "weight", path, (n, k), dtype, why)
    rows, columns = scheme.spec("bfloat16").scale_shape(k, n)
    scale_shape = (columns, rows)
    if scheme.strategy == "tensor":
        tensors = {**tensors, **_as_matrices(tensors)}
    scale = take_scales(tensors, "weight_scale", path, scale_shape, why)
    spec = scheme.spec(scale_dtype(scale))
    input_scale = _input_scale(tensors, scheme, path)
    if spec.is_float:
        if (stored.view(np.uint8) & 0x7F == 0x7F).any():
            raise CheckpointError(f"{path}.weight: has NaN; quantize the original model again")
        return float_qtensor(stored.T, scale.T, spec, input_scale)
    zeros = None
    if not scheme.symmetric:
        zeros = take(tensors, "weight_zero_point", path, scale_shape, np.int8, why)
        zeros = _unsigned(zeros, spec, f"{path}.weight_zero_point").T
    elif np.any(np.asarray(tensors.get("weight_zero_point", 0))):
        raise _unexpected_zeros(path)
    codes = pack_codes(_unsigned(stored, spec, f"{path}.weight").T, spec.bits)
    return make_qtensor(codes, scale.T, zeros, spec, (k, n), None, input_scale)


def _as_matrices(tensors: Arrays) -> dict[str, np.ndarray]:
    """Scale and zero point of a whole tensor as [1, 1], from [] and [1]."""
    names = ("weight_scale", "weight_zero_point")
    one = {name: tensors[name] for name in names if name in tensors}
    return {name: array.reshape(1, 1) for name, array in one.items() if array.size == 1}


def _unsigned(stored: np.ndarray, spec: QuantSpec, name: str) -> np.ndarray:
    """int8 in [-2**(bits-1), 2**(bits-1)) -> uint8 in [0, 2**bits)."""
    offset = spec.zero_offset
    if spec.bits < 8 and stored.size and (stored.min() < -offset or stored.max() >= offset):
        raise CheckpointError(
            f"{name}: values from {stored.min()} to {stored.max()} do not fit the {spec.bits} bits "
            "of config.json; num_bits is wrong, or the file is damaged"
        )
    return stored.view(np.uint8) + np.uint8(offset)


def _input_scale(tensors: Arrays, scheme: CompressedTensorsScheme, path: str) -> Any:
    """float32 [] of a static scale; None with dynamic activations."""
    static = scheme.activation is not None and scheme.activation.static
    if np.any(np.asarray(tensors.get("input_zero_point", 0)).astype(np.float32)):
        raise CheckpointError(
            f"{path}.input_zero_point is not 0: asymmetric activations cannot be read; quantize "
            "the original model with symmetric ones"
        )
    if not static:
        if "input_scale" in tensors:
            raise CheckpointError(
                f"{path}.input_scale is there, but config.json says that activations are "
                f"{'not quantized' if scheme.activation is None else 'dynamic'}; get both from the "
                "same place"
            )
        return None
    one = {name: array.reshape(1) for name, array in tensors.items() if name == "input_scale"}
    scale = take_scales(one, "input_scale", path, (1,), "the scale of activations is static")
    return scale.astype(np.float32).reshape(())


def _unexpected_zeros(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path}.weight_zero_point is there, but config.json says symmetric=true; get both from "
        "the same place"
    )


def _strategy(scheme: CompressedTensorsScheme) -> str:
    size = "" if scheme.group_size == -1 else f" of {scheme.group_size}"
    return f"{scheme.strategy!r}{size}"


def _to_packed(w: QTensor, scheme: CompressedTensorsScheme) -> dict[str, np.ndarray]:
    arrays = {
        "weight_packed": words.from_bytes(packed_codes(w), scheme.num_bits, w.k, 1),
        "weight_scale": np.asarray(w.scale).T,
        "weight_shape": np.array([w.n, w.k], np.int64),
    }
    if not scheme.symmetric:
        zeros = np.ascontiguousarray(zeros_of(w).T)
        arrays["weight_zero_point"] = words.pack(zeros, scheme.num_bits, 0)
    if scheme.act_order:
        order = np.arange(w.k) if w.order is None else np.asarray(w.order)
        arrays["weight_g_idx"] = groups_of(order, scheme.group_size)
    return arrays


def _to_plain(w: QTensor, scheme: CompressedTensorsScheme) -> dict[str, np.ndarray]:
    scale = np.asarray(w.scale).T
    if scheme.strategy == "tensor":
        scale = scale.reshape(1)
    arrays: dict[str, np.ndarray] = {"weight_scale": scale}
    if w.spec.is_float:
        arrays["weight"] = np.asarray(w.codes).T
    else:
        codes = unpack_codes(packed_codes(w), w.spec.bits, w.k)
        arrays["weight"] = _signed(codes, w.spec).T
    if not scheme.symmetric:
        arrays["weight_zero_point"] = _signed(zeros_of(w), w.spec).T
    if w.input_scale is not None:
        arrays["input_scale"] = _stored_input_scale(w)
    return arrays


def _signed(codes: np.ndarray, spec: QuantSpec) -> np.ndarray:
    return (codes - np.uint8(spec.zero_offset)).view(np.int8)


def _stored_input_scale(w: QTensor) -> np.ndarray:
    """[1], in the dtype of the weight's scales where that holds it exactly, else float32."""
    scale = np.asarray(w.input_scale, np.float32).reshape(1)
    cast = scale.astype(SCALE_DTYPES[w.spec.scale_dtype])
    return cast if np.array_equal(cast.astype(np.float32), scale) else scale
