"""Machine code of `quantize_rows` for every family it is for, as each supported JAX compiles it."""

import pytest

from jq.pallas_kernels.capability import SERVED, spell
from tests.pallas_kernels import assembling, sass_rows
from tests.pallas_kernels.assembling import VERSIONS

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
    reports = assembling.printed(version, "sass_rows.py", capability)
    for variant in sass_rows.variants(capability):
        report = reports.pop(variant.name)
        assert report["local"] == 0, report
        assert report["slow"] == [], report
        assert report["registers"] <= 255, report
        assert report["per_value"] <= variant.per_value, report
    assert not reports
