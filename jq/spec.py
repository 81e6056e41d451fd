"""What a quantized linear looks like: number formats and the granularity of their scales."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from jq.errors import SpecError

FP8 = "float8_e4m3fn"
FP8_MAX = 448.0  # largest finite float8_e4m3fn; JAX's cast turns anything beyond it into NaN

WeightGranularity = Literal["group", "channel", "tensor", "block"]
ActivationGranularity = Literal["token", "tensor", "group"]
ScaleDtype = Literal["bfloat16", "float16", "float32"]

_INT = re.compile(r"int([2-8])")


def int_bits(dtype: str) -> int | None:
    """Bits of "int2".."int8"; None for any other dtype name."""
    match = _INT.fullmatch(dtype)
    return int(match.group(1)) if match else None


@dataclasses.dataclass(frozen=True)
class ActivationSpec:
    """How the input of a linear is quantized when the dot itself runs in 8 bits.

    dtype: "int8" or "float8_e4m3fn".
    granularity: "token" (one scale per row of x: SmoothQuant's O1), "tensor" (one per call, O2) or
      "group" (one per row and `group_size` inputs; float8 with block-scaled weights only).
    static: the scale was measured on calibration data and travels with the weight (O3); needs
      "tensor".
    """

    dtype: str = "int8"
    granularity: ActivationGranularity = "token"
    static: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("int8", FP8):
            raise SpecError(f"activation dtype {self.dtype!r} is not one of 'int8', {FP8!r}")
        if self.static and self.granularity != "tensor":
            raise SpecError(
                f"static activations need granularity='tensor', not {self.granularity!r}: "
                "per-token scales are only known at run time"
            )


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Number format of a quantized weight `[K, N]` (inputs x outputs) and of its activations.

    dtype: "int2" ... "int8" or "float8_e4m3fn".
    group_size: inputs that share a scale, per output channel; -1 means the whole column
      ("channel").
    symmetric: no zero point; the grid is (q - 2**(bits-1)) * scale.
    granularity: "group" [K/g, N], "channel" [1, N], "tensor" [1, 1], "block" [K/g, N/g] (float8
      only).
    scale_dtype: storage of the scales; codes are computed with the rounded scale.
    activation: None for weight-only, else how x is quantized (the dot then runs in 8 bits).

    Raises SpecError for combinations that have no meaning.
    """

    dtype: str = "int4"
    group_size: int = 128
    symmetric: bool = True
    granularity: WeightGranularity = "group"
    scale_dtype: ScaleDtype = "bfloat16"
    activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        if self.dtype != FP8 and int_bits(self.dtype) is None:
            raise SpecError(f"weight dtype {self.dtype!r} is not one of 'int2'..'int8', {FP8!r}")
        if self.granularity == "group" and self.group_size == -1:
            object.__setattr__(self, "granularity", "channel")
        if self.granularity in ("channel", "tensor"):
            object.__setattr__(self, "group_size", -1)
        elif self.group_size < 1:
            raise SpecError(
                f"group_size {self.group_size} is neither positive nor -1 (per channel)"
            )
        if self.is_float and not self.symmetric:
            raise SpecError(f"{self.dtype} weights have no zero point: use symmetric=True")
        if self.granularity == "block" and not self.is_float:
            raise SpecError(f"granularity 'block' is for {FP8} weights, not {self.dtype}")
        self._check_activation()

    def _check_activation(self) -> None:
        act = self.activation
        if act is None:
            return
        if self.is_float != (act.dtype == FP8) or (not self.is_float and self.bits != 8):
            raise SpecError(
                f"{act.dtype} activations need weights of the same 8-bit kind, not {self.dtype}"
            )
        if not self.symmetric:
            raise SpecError(
                "8-bit activations need symmetric weights: a zero point would not factor out"
            )
        if (act.granularity == "group") != (self.granularity == "block"):
            raise SpecError(
                f"activation granularity {act.granularity!r} does not go with weight granularity "
                f"{self.granularity!r}: 'group' and 'block' need each other"
            )
        if self.granularity == "group":
            raise SpecError(
                "8-bit activations need one weight scale per output: "
                "granularity 'channel' or 'tensor'"
            )

    @property
    def is_float(self) -> bool:
        return self.dtype == FP8

    @property
    def bits(self) -> int:
        return int_bits(self.dtype) or 8

    @property
    def zero_offset(self) -> int:
        """The implicit zero point of a symmetric integer grid."""
        return 2 ** (self.bits - 1)

    @property
    def has_zero_point(self) -> bool:
        return not self.symmetric

    def num_groups(self, k: int) -> int:
        """Rows of the scale for K inputs.  Raises SpecError when group_size does not divide K."""
        if self.granularity in ("channel", "tensor"):
            return 1
        check_group_size(k, self.group_size)
        return k // self.group_size

    def scale_shape(self, k: int, n: int) -> tuple[int, int]:
        """Shape of the scale of a [k, n] weight."""
        if self.granularity == "tensor":
            return 1, 1
        if self.granularity == "block":
            check_group_size(n, self.group_size, axis="outputs")
            return self.num_groups(k), n // self.group_size
        return self.num_groups(k), n

    def bits_per_weight(self, k: int, n: int) -> float:
        """Stored bits per weight with scales and zero points (4.125 for symmetric int4 g128)."""
        rows, columns = self.scale_shape(k, n)
        scale_bits = {"bfloat16": 16, "float16": 16, "float32": 32}[self.scale_dtype]
        per_scale = scale_bits + (self.bits if self.has_zero_point else 0)
        return self.bits + per_scale * rows * columns / (k * n)


def check_group_size(k: int, group_size: int, path: str = "weight", axis: str = "inputs") -> None:
    """Raise SpecError, with the sizes that would do, unless group_size divides k."""
    if group_size > 0 and k % group_size == 0:
        return
    valid = [g for g in (16, 32, 64, 128, 256, 512, 1024) if k % g == 0]
    raise SpecError(
        f"{path}: group_size {group_size} does not divide its {k} {axis}; "
        f"valid sizes: {', '.join(map(str, valid)) or 'none of the usual'} or -1 (per channel)"
    )


def w4a16(group_size: int = 128, *, symmetric: bool = True) -> QuantSpec:
    """int4 weights in groups, 16-bit activations."""
    return QuantSpec("int4", group_size, symmetric)


def w8a8(
    dtype: Literal["int8", "float8_e4m3fn"] = "int8",
    *,
    activation: ActivationGranularity = "token",
    static: bool = False,
    weight: WeightGranularity = "channel",
) -> QuantSpec:
    """8-bit weights and activations.

    SmoothQuant's O1 is activation="token", O2 "tensor", and O3 "tensor" with static=True.
    """
    act = ActivationSpec(dtype, activation, static)
    size = 128 if weight == "block" else -1
    return QuantSpec(dtype, size, True, weight, "float32", act)
