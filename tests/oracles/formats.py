"""Number formats, one number at a time: grids, the nearest code, and how near a tie it was."""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

FP8_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Format:
    """An integer grid of `bits` bits, or float8_e4m3fn where bits is None."""

    bits: int | None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"

    @property
    def top(self) -> int:
        assert self.bits is not None
        return 2**self.bits - 1


def format_of(spec) -> Format:
    """The oracle's own description of a `QuantSpec`."""
    bits = None if spec.dtype == "float8_e4m3fn" else int(spec.dtype.removeprefix("int"))
    return Format(bits, spec.symmetric, spec.scale_dtype)


def fp8_value(code: int) -> float:
    """The number that the byte `code` means in float8_e4m3fn."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


_FP8_CODES = [code for code in range(256) if not math.isnan(fp8_value(code)) and code != 0x80]
_FP8_CODES.sort(key=fp8_value)
_FP8_VALUES = np.array([fp8_value(code) for code in _FP8_CODES])


def store(scale: float, dtype: str) -> float:
    """Round a scale to the dtype it is stored in."""
    kept = np.float32(scale).astype(getattr(ml_dtypes, dtype, dtype))
    return float(kept)


def grid(lo: float, hi: float, fmt: Format) -> tuple[float, float]:
    """(scale, zero) of a range that contains zero; the unit scale for an empty range."""
    assert lo <= 0 <= hi
    if fmt.symmetric:
        hi = max(-lo, hi)
        lo = -hi
    width = hi - lo
    if fmt.bits is None:
        return store(hi / FP8_MAX if hi > 0 else 1.0, fmt.scale_dtype), 0.0
    scale = store(width / fmt.top if width > 0 else 1.0, fmt.scale_dtype)
    if fmt.symmetric:
        return scale, 2.0 ** (fmt.bits - 1)
    return scale, float(min(max(np.round(-lo / scale), 0), fmt.top))


def nearest(w: float, scale: float, zero: float, fmt: Format) -> tuple[int, float]:
    """(code, margin): the nearest grid point, and how far w is from the next rounding boundary.

    The margin is in steps of the grid; infinite beyond the grid's ends, where all is clipped.  The
    code of a float8 is its byte.
    """
    if fmt.bits is None:
        return _nearest_fp8(w / scale)
    position = w / scale + zero
    code = int(min(max(np.round(w / scale) + zero, 0), fmt.top))
    boundary = math.floor(position) + 0.5
    inside = 0 < boundary < fmt.top
    return code, abs(position - boundary) if inside else math.inf


def _nearest_fp8(x: float) -> tuple[int, float]:
    x = min(max(x, -FP8_MAX), FP8_MAX)
    above = int(np.searchsorted(_FP8_VALUES, x))
    if _FP8_VALUES[above] == x:
        return _FP8_CODES[above], 0.5
    low, high = _FP8_VALUES[above - 1], _FP8_VALUES[above]
    middle = (low + high) / 2
    margin = abs(x - middle) / (high - low)
    if x == middle:  # ties go to the even mantissa
        return next(c for c in (_FP8_CODES[above - 1], _FP8_CODES[above]) if c % 2 == 0), 0.0
    return _FP8_CODES[above if x > middle else above - 1], margin


def value(code: int, scale: float, zero: float, fmt: Format) -> float:
    """The weight that a code stands for."""
    return fp8_value(code) * scale if fmt.bits is None else (code - zero) * scale


def nearest_row(
    w: np.ndarray, scale: np.ndarray, zero: np.ndarray, fmt: Format
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` for each output: (codes [N], margins [N])."""
    pairs = [nearest(*args, fmt) for args in zip(w, scale, zero, strict=True)]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def value_row(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, fmt: Format) -> np.ndarray:
    """`value` for each output [N]."""
    return np.array([value(int(c), s, z, fmt) for c, s, z in zip(codes, scale, zero, strict=True)])
