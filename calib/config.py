"""The knobs of calibration, under the names people know from LMDeploy and the papers."""

from __future__ import annotations

import dataclasses

from jq.errors import CalibrationError


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """What to calibrate on.

    Attributes:
        calib_dataset: a local .txt, .jsonl, .npy, .json, .csv or .parquet file; "wikitext2", "c4"
            or "pile"; or any dataset of the Hugging Face hub as "name:config:split" (the last two
            may be left out).
        calib_samples: windows of tokens.
        calib_seqlen: tokens per window.  When memory is short, lower it and raise calib_samples.
        batch_size: windows on the device at a time when hidden states are offloaded; it never
            changes the result.
        offload: keep hidden states in host memory; for calibration sets that the device's memory
            cannot hold beside a block.
        calib_field: the field that holds the text, where a source has fields.
        seed: of the choice of windows.

    Raises: CalibrationError for a count below one or a negative seed.
    """

    calib_dataset: str = "wikitext2"
    calib_samples: int = 128
    calib_seqlen: int = 2048
    batch_size: int = 1
    offload: bool = False
    calib_field: str = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calib_samples", "calib_seqlen", "batch_size"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.seed < 0:
            raise CalibrationError(f"seed is {self.seed}; it must be 0 or more")
