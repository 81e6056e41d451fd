"""Comparisons out of numbers, for what only reads results."""

from __future__ import annotations

import numpy as np

from jq.compare.arms import ORIGINAL, Numbers, find_arms
from jq.compare.quality import Quality
from jq.compare.results import ArmResult, Comparison

EDGES = (1, 8, 16, 32)
NUMBERS = Numbers(bits=4, group_size=32)
SPEC = {
    "model": {"name": "tiny", "sha256": "ab" * 32},
    "numbers": {"bits": 4, "group_size": 32, "symmetric": False, "skip": []},
    "calibration": {"source": "notes.txt", "samples": 4, "seq_len": 32, "sha256": "cd" * 32},
    "evaluation": {
        "text": "held-out.txt",
        "sha256": "ef" * 32,
        "seq_len": 32,
        "windows": 24,
        "words_per_token": 0.5,
    },
    "timing": {"batch_sizes": [1, 4], "prompt_tokens": 8, "steps": 20},
    "tasks": [],
    "batch_size": 1,
    "versions": {"jaxq": "0.1.0", "jax": "0.11.2"},
    "device": {"platform": "cpu", "kind": "a processor", "cores": 2, "count": 1},
}


def base_nll(windows=24, seed=0):
    """Scores of the original, `[n, E]`."""
    return np.random.default_rng(seed).normal(3.0, 0.3, (windows, len(EDGES) - 1))


def done(
    *, rise=0.0, noise=0.0, kl=0.0, ms=10.0, megabytes=100.0, seed=1, tasks=None, windows=24, **more
):
    """The file of an arm whose negative log-likelihoods are the original's + rise + noise."""
    base = base_nll(windows)
    nll = base + rise + noise * np.random.default_rng(seed).normal(size=base.shape)
    scores = {"nll": nll}
    if kl:
        scores |= {"kl": np.full_like(nll, kl), "top1": np.full_like(nll, 0.9)}
    paths = [f"layers_{i}/{name}" for i in (0, 1) for name in ("attention/q_proj", "mlp/up_proj")]
    linears = [
        {
            "path": path,
            "weight_error": 0.1,
            "output_error": 0.01 * (i + 1),
            "rtn_output_error": 0.05,
            "warnings": [],
        }
        for i, path in enumerate(paths)
    ]
    return {
        "status": "done",
        "error": None,
        "made": {
            "seconds": 12.0,
            "peak_host_bytes": 5e8,
            "peak_device_bytes": None,
            "linears": linears,
        },
        "size": {
            "bits_per_weight": 4.5,
            "weight_bytes": megabytes * 1e6,
            "disk_bytes": megabytes * 1.1e6,
        },
        "memory": {"peak_host_bytes": 3e8, "peak_device_bytes": None},
        "speed": [batch(size, ms * size**0.5) for size in (1, 4)],
        "quality": Quality("ef" * 32, EDGES, scores).to_dict(),
        "tasks": tasks or {},
    } | more


def batch(size, ms):
    """As `jq.bench.BatchTiming.to_dict` has it."""
    step = {"count": 20, "mean": ms / 1e3, "p50": ms / 1e3, "p95": 2e-3 * ms, "p99": 3e-3 * ms}
    return {
        "batch_size": size,
        "prompt_tokens": 8,
        "first_call_seconds": 1.0,
        "prefill_seconds": step,
        "prefill_tokens_per_second": 8e3 * size / ms,
        "decode_seconds": step,
        "decode_tokens_per_second": 1e3 * size / ms,
    }


def failed(error="NonFiniteError: layers_0: NaN"):
    """The file of an arm that went wrong."""
    return {"status": "failed", "error": error}


def comparison(original=None, /, **arms):
    """Of files by arm (underscores for hyphens), the original's first."""
    files = {name.replace("_", "-"): file for name, file in arms.items()}
    found = find_arms(list(files), NUMBERS)
    files[ORIGINAL] = done() if original is None else original
    return Comparison(SPEC, "12" * 32, tuple(ArmResult(arm, files[arm.name]) for arm in found))
