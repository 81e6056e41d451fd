"""Calibration: the tokens, the statistics of activations, the block-by-block driver.

Import it as `jq.calib`.  The submodules are imported where they are used:

    jq.calib.config    CalibrationConfig, the knobs
    jq.calib.source    calibration_data, calibration_from_tokens, token_stream
    jq.calib.text      documents of text files, of `datasets`' formats and of hub datasets
    jq.calib.tokens    CalibrationData; windows, rows and padding, on plain arrays
    jq.calib.driver    quantize_model, quantize_blocks: a model of any depth, a block at a time
    jq.calib.stages    one stage of a block over all samples, with the statistics of its input
    jq.calib.scaling   the scale per channel of a group of linears
    jq.calib.report    what happened to each block and linear, and progress

Calibration receives a model as an argument and a tokenizer as a function; it knows neither.
"""

from __future__ import annotations

if __name__ != "jq.calib":
    raise ImportError(f"import this package as jq.calib, not as {__name__}")

from importlib import import_module
from typing import Any

_EXPORTS = {
    "CalibrationConfig": "config",
    "CalibrationData": "tokens",
    "QuantizedBlock": "driver",
    "TreeSource": "driver",
    "calibration_data": "source",
    "calibration_from_tokens": "source",
    "quantize_blocks": "driver",
    "quantize_model": "driver",
    "token_stream": "source",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
