"""How fast a model runs here, and how near that is to what the device can do.

result = measure_decode(model, params, batch_sizes=(1, 8), prompt_tokens=128, steps=200)
result.batches[0].decode.p50, result.batches[0].decode_tokens_per_second
"""

from __future__ import annotations

from jq.bench.decode import measure_decode
from jq.bench.result import BatchTiming, BenchResult, Device, Latency

__all__ = ["BatchTiming", "BenchResult", "Device", "Latency", "measure_decode"]
