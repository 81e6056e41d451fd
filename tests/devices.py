"""Tests that need several devices: their file runs once more, in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
EIGHT = len(jax.devices()) == 8
on_eight = pytest.mark.skipif(not EIGHT, reason="runs in the process with eight devices")


def run_with(devices: int, file: str, marked: str = "", flags: str = "") -> None:
    """Run a test file with so many CPU devices; all that runs there has to pass.

    marked: pytest's expression of the marks that run there; flags: more of XLA's.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {flags}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, file],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
