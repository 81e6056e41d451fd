"""The kernels' machine code for Hopper, as each supported JAX compiles it: no GPU is needed.

Bounds are recorded in sass_bounds.json, as [registers, instructions per tile].  After a change that
makes the code cheaper, or a new variant, record them again with

    python -m tests.pallas_kernels.test_sass
"""

import pytest

from jq.pallas_kernels.config import SHARED_MEMORY
from tests.pallas_kernels import assembling, variants

BOUNDS = assembling.bounds_of("sass_bounds.json")


@pytest.fixture(scope="module")
def bounds() -> dict[str, list[float]]:
    return assembling.read(BOUNDS)


def test_every_variant_has_bounds(bounds):
    assert set(bounds) == {variant.name for variant in variants.ALL}


def test_the_bounds_leave_time_for_the_memory(bounds):
    """At an H200's full bandwidth a multiprocessor gets a tile every 124 clock cycles."""
    for name, (_, slots) in bounds.items():
        if name.startswith("decode"):
            assert slots <= 90, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "name"), assembling.cases([variant.name for variant in variants.ALL])
)
def test_machine_code(bounds, version, name):
    report = assembling.reports(version, "variants")[name]
    assert report["tensor"] >= 8, "wgmma takes the operands in two slices of four instructions"
    assert report["drains"] == 0
    assert report["shared"] <= SHARED_MEMORY
    assembling.check(report, bounds[name])


@pytest.mark.slow
@pytest.mark.parametrize("version", assembling.VERSIONS)
def test_shared_memory_is_what_the_config_says(version):
    """`shared_bytes` is checked before anything is compiled: it must not promise too much."""
    found = assembling.reports(version, "variants")
    for variant in variants.ALL[:: assembling.EVERY[version]]:
        assert found[variant.name]["shared"] <= variant.config.shared_bytes() + 1024, variant.name


if __name__ == "__main__":
    assembling.record(BOUNDS, "variants")
