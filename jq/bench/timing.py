"""Seconds per call of a compiled program, from many calls in a row."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from jq.bench.result import Latency

Clock = Callable[[], float]

_SAMPLE_S = 5e-3  # a sample is so many calls that the clock and the last wait do not matter


def time_calls(
    call: Callable[[], Any],
    *,
    samples: int = 20,
    sample_seconds: float = _SAMPLE_S,
    clock: Clock = time.perf_counter,
) -> tuple[float, Latency]:
    """Time a call that may return before the device has done its work.

    Args:
      call: runs the program once; returns arrays.
      samples: how many to take; each is the mean of as many calls as fill `sample_seconds`, sent
        off one after the other, with one wait at the end.
      clock: seconds.
    Returns: seconds of the first call, compilation included, and the seconds per call.
    """
    first = _seconds(call, 1, clock)
    once = max(_seconds(call, 1, clock), 1e-9)
    calls = max(round(sample_seconds / once), 1)
    return first, Latency(tuple(_seconds(call, calls, clock) / calls for _ in range(samples)))


def _seconds(call: Callable[[], Any], calls: int, clock: Clock) -> float:
    start = clock()
    out = None
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return clock() - start
