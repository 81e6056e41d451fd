"""Mosaic's interpreter in programs of their own, which print a JSON object per case.

The interpreter needs a thread of XLA's pool for each warpgroup of a cluster, and a small machine's
pool has fewer: NPROC is read when JAX starts. By hand, in the repository's root:

    NPROC=48 JAX_PLATFORMS=cpu python -m tests.pallas_kernels.interpreted [part of a case's name]
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]


def interpretations(program: ModuleType) -> dict[str, dict[str, Any]]:
    """Case's name -> what the program says of it."""
    done = subprocess.run(
        [sys.executable, "-m", program.__name__],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"NPROC": "48", "JAX_PLATFORMS": "cpu"},
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


def show(cases: Iterable[Any], result: Callable[[Any], dict[str, Any]], texts: Sequence[str] = ()):
    """Print the result of each case, or of those whose name has one of the texts."""
    for case in cases:
        if not texts or any(text in case.name for text in texts):
            print(json.dumps(result(case)), flush=True)


def races() -> bool:
    """Whether the kernel that was interpreted last had any."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    return bool(interpreter.get_races().races_found)


def compared(name: str, got, exact: np.ndarray) -> dict[str, Any]:
    """A case's result: its errors against float64, and whether a race was seen."""
    y = np.asarray(got, np.float64)
    return {
        "name": name,
        "error": np.linalg.norm(y - exact) / np.linalg.norm(exact),
        "worst": np.max(np.abs(y - exact)) / np.max(np.abs(exact)),
        "races": races(),
    }


class WithoutFences:
    """Mosaic's names, but that nothing orders ordinary accesses to shared memory with copies."""

    def __getattr__(self, name):
        from jq.pallas_kernels.compat import plgpu

        return getattr(plgpu, name)

    def commit_smem(self) -> None:
        pass
