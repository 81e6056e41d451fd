"""How fast a model runs here, and how near that is to what the device can do.

result = measure_decode(model, params, batch_sizes=(1, 8), prompt_tokens=128, steps=200)
result.batches[0].decode.p50, result.batches[0].decode_tokens_per_second
ceilings = measure_ceilings((result.dtype,))
roofline(decode_work(model, params, 8, result.batches[1].cache_tokens), ceilings).bound
"""

from __future__ import annotations

from jq.bench.ceilings import Ceilings, measure_ceilings
from jq.bench.decode import measure_decode
from jq.bench.linears import LinearTiming, measure_linears
from jq.bench.result import BatchTiming, BenchResult, Device, Latency
from jq.bench.work import Roofline, Work, decode_work, linear_work, prefill_work, roofline

__all__ = [
    "BatchTiming",
    "BenchResult",
    "Ceilings",
    "Device",
    "Latency",
    "LinearTiming",
    "Roofline",
    "Work",
    "decode_work",
    "linear_work",
    "measure_ceilings",
    "measure_decode",
    "measure_linears",
    "prefill_work",
    "roofline",
]
