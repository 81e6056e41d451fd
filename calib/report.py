"""What a calibration run tells: progress while it works, and a report per linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Progress:
    """One step of the work.

    done, total: groups of linears finished, and in all.
    block: name of the block.
    group: name of the group that was just finished.
    error: largest relative output error of its linears; None without statistics.
    seconds: since the run began.
    before: groups that an earlier run had finished.
    """

    done: int
    total: int
    block: str
    group: str
    error: float | None
    seconds: float
    before: int = 0

    @property
    def seconds_left(self) -> float:
        """Estimate of the time left, from the average so far."""
        return self.seconds / (self.done - self.before) * (self.total - self.done)


ProgressCallback = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class LinearReport:
    """One quantized linear.

    path: "layers_0/attention/q_proj".
    dtype, bits_per_weight: its format, scales and zero points included.
    method: "GPTQ(...)" with its options.
    weight_error: ||W - Q|| / ||W||, after whatever scale was folded in.
    output_error, rtn_output_error: relative error of its outputs on the calibration tokens, and
      that of rounding to nearest; None when no statistics were collected.
    damp_percent: damping GPTQ used, which may be more than asked for; None for other methods.
    scale_choice: exponent (AWQ) or alpha (SmoothQuant) chosen, None without.
    tokens: calibration tokens behind the statistics.
    warnings: what the user should know ("rounded to nearest: ...").
    """

    path: str
    dtype: str
    bits_per_weight: float
    method: str
    weight_error: float
    output_error: float | None
    rtn_output_error: float | None
    damp_percent: float | None
    scale_choice: float | None
    tokens: int
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """All quantized linears of a block, and the seconds it took."""

    name: str
    linears: tuple[LinearReport, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)
