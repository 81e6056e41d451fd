"""Marlin, the yardstick among CUDA kernels for int4: built here where its source is given.

    python scripts/gpu_check.py --marlin path/to/marlin

Only its speed is looked at: weights are random bits, float16 as it wants them, groups of 128.
Needs PyTorch and nvcc.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.gpu.problems import Problem, of_item, to_item

SOURCES = ("marlin/marlin_cuda.cpp", "marlin/marlin_cuda_kernel.cu")
_SHAPES = ((4096, 14336), (4096, 4096), (8192, 28672))
_ROWS = (16, 1, 64, 128, 512, 4096)
_COLD_BYTES = 192 << 20
_MAX_PAR = 16


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The build, then the headline's shapes."""
    problems = [Problem(m, *shape, dtype="float16") for shape in _SHAPES for m in _ROWS]
    return [{"key": "build"}, *(to_item(p) for p in problems)]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Build, or time one problem."""
    kernels = _build(facts["marlin"])
    return {"built": True} if item["key"] == "build" else time_problem(kernels, of_item(item))


@functools.cache
def _build(source: str) -> Any:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    from torch.utils import cpp_extension  # pyright: ignore[reportMissingImports]

    folder = Path(tempfile.gettempdir(), "jaxq-marlin-build")  # found again after a restart
    folder.mkdir(exist_ok=True)
    paths = [str(Path(source, name)) for name in SOURCES]
    return cpp_extension.load(
        "marlin_cuda", paths, extra_cuda_cflags=["-O3"], build_directory=str(folder)
    )


def time_problem(kernels: Any, p: Problem) -> dict[str, Any]:
    """Microseconds per product: of the kernels alone, and of a replayed graph of many."""
    import torch  # pyright: ignore[reportMissingImports]

    count = max(2, min(32, -(-_COLD_BYTES // (p.k * p.n // 2))))
    options: dict[str, Any] = {"device": "cuda"}

    def arrays() -> tuple[Any, ...]:
        bits = torch.randint(
            -(2**31), 2**31 - 1, (p.k // 16, 2 * p.n), dtype=torch.int32, **options
        )
        x = torch.randn(p.m, p.k, dtype=torch.float16, **options)
        y = torch.empty(p.m, p.n, dtype=torch.float16, **options)
        scale = torch.rand(p.groups, p.n, dtype=torch.float16, **options) / p.k**0.5
        locks = torch.zeros(p.n // 128 * _MAX_PAR, dtype=torch.int32, **options)
        return x, bits, y, scale, locks

    sets = [arrays() for _ in range(count)]

    def every() -> None:
        for x, bits, y, scale, locks in sets:
            kernels.mul(x, bits, y, scale, locks, -1, -1, -1, _MAX_PAR)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            every()
    torch.cuda.synchronize()
    told: dict[str, Any] = {"m": p.m, "k": p.k, "n": p.n, "weights": count}
    told["us"] = _kernel_us(torch, every) / count
    try:
        told["us_graph"] = _graph_us(torch, every) / count
    except RuntimeError as error:
        told["graph_error"] = str(error)[:300]
    return told


def _kernel_us(torch: Any, every: Any, calls: int = 10) -> float:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            every()
        torch.cuda.synchronize()
    total = 0.0
    for event in profile.key_averages():
        total += getattr(event, "self_device_time_total", 0) or 0
    return total / calls


def _graph_us(torch: Any, every: Any, replays: int = 20) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / replays)
    return statistics.median(times)
