"""What is here: versions, the device, and which clock works."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy", "torch")
_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,mig.mode"


def items(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cheap, and without a timer."""
    return [{"key": "versions"}, {"key": "device"}, {"key": "nvidia-smi"}, {"key": "cupti"}]


def run(item: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """One of them."""
    return {"versions": versions, "device": device, "nvidia-smi": smi, "cupti": cupti}[
        item["key"]
    ]()


def versions() -> dict[str, Any]:
    """Of Python and the packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    flags = {name: os.environ.get(name) for name in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return {"python": platform.python_version(), "cores": os.cpu_count(), **found, **flags}


def device() -> dict[str, Any]:
    """JAX's first device."""
    import jax

    first = jax.devices()[0]
    capability = getattr(first, "compute_capability", None)
    stats = first.memory_stats() or {}
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "capability": capability,
        "cores": getattr(first, "core_count", None),
        "memory_bytes": stats.get("bytes_limit"),
        "devices": jax.device_count(),
    }


def smi() -> dict[str, Any]:
    """What the driver says; "" where there is none."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"text": "", "error": str(error)}
    return {"text": done.stdout.strip(), "code": done.returncode}


def cupti() -> dict[str, Any]:
    """Whether kernels can be timed one by one: a program of two, known to take some time."""
    import jax
    import jax.numpy as jnp

    from scripts.gpu import timing

    if jax.default_backend() == "cpu":
        return {"works": False}
    x = jax.random.normal(jax.random.key(0), (2048, 2048), jnp.bfloat16)
    program = jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile()
    result = timing.measure(program, [x], 1, "cupti", 4)
    second = timing.measure(program, [x], 1, "cupti", 4)  # it has to work more than once
    works = result["timer"] == second["timer"] == "cupti" and 5 < result["us"] < 5000
    return {"works": works, "first": result, "second": second}
