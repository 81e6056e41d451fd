"""Machine code of `quantize_rows` for every family it is for, as each supported JAX compiles it."""

import json
import os
import subprocess

import pytest

from jq.pallas_kernels.capability import SERVED, spell
from tests.pallas_kernels import sass_rows
from tests.pallas_kernels.assembling import ROOT, VERSIONS, compiler

CAPABILITIES = tuple(map(spell, SERVED))


def cases():
    for version in VERSIONS:
        # Ampere's other half, and Ada, with one JAX: what is compiled differs by the family alone.
        for capability in CAPABILITIES if version == VERSIONS[0] else CAPABILITIES[-1:]:
            yield version, capability


@pytest.mark.slow
@pytest.mark.parametrize(("version", "capability"), list(cases()))
def test_machine_code(version, capability):
    """Everything in registers, and no conversion that runs at a quarter of the speed."""
    if os.environ.get("JAXQ_NO_SASS") == "1" or not compiler(version).exists():
        pytest.skip(f"no compiler of JAX {version}: scripts/sass_check makes it")
    done = subprocess.run(
        [compiler(version), ROOT / "tests" / "pallas_kernels" / "sass_rows.py", capability],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}
    for variant in sass_rows.variants(capability):
        report = reports.pop(variant.name)
        assert report["local"] == 0, report
        assert report["slow"] == [], report
        assert report["registers"] <= 255, report
        assert report["per_value"] <= variant.per_value, report
    assert not reports
