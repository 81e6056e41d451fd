"""The examples of programs of one's own: they run on one device and on eight, to the same end."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.examples import pjit_quantize, pmap_calibrate

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("example", "largest"), [(pmap_calibrate, 0.08), (pjit_quantize, 0.1)], ids=["pmap", "pjit"]
)
def test_examples_run_on_one_device_and_on_eight(example, largest, capsys):
    error = example.main()
    assert 0.03 < error < largest
    assert capsys.readouterr().out.startswith("1 devices")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, example.__file__],
        cwd=ROOT,
        env=os.environ | flags | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("8 devices")
    (other,) = re.findall(r"error (0\.\d+)", done.stdout)
    # pmap has eight times the rows there; pjit the same ones.
    assert float(other) == pytest.approx(error, rel=0.2)
