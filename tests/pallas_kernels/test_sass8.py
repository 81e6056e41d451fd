"""The W8A8 kernels' machine code for Hopper, as each supported JAX compiles it: no GPU is needed.

Bounds are recorded in sass_bounds8.json, as [registers, instructions per slice].  After a change
that makes the code cheaper, or a new variant, record them again with

    python -m tests.pallas_kernels.test_sass8
"""

import pytest

from jq.pallas_kernels.config import SHARED_MEMORY
from jq.pallas_kernels.config8 import BARRIERS, Decode8Config
from tests.pallas_kernels import assembling, variants8

BOUNDS = assembling.bounds_of("sass_bounds8.json")
VARIANTS = {variant.name: variant for variant in variants8.ALL}


@pytest.fixture(scope="module")
def bounds() -> dict[str, list[float]]:
    return assembling.read(BOUNDS)


def test_every_variant_has_bounds(bounds):
    assert set(bounds) == set(VARIANTS)


def test_the_bounds_leave_time_for_the_memory_and_for_the_tensor_cores(bounds):
    """A warp of each warpgroup is on each of the four schedulers, which issue one instruction per
    clock cycle.  At an H200's full bandwidth a slice of 64 columns and 128 inputs comes every 496
    cycles, and the tensor cores take two for every column of a slice of 64 rows."""
    for name, (_, slots) in bounds.items():
        config = VARIANTS[name].config
        budget = 496 if isinstance(config, Decode8Config) else 2 * config.block_n
        assert slots <= 0.9 * budget, name


@pytest.mark.slow
@pytest.mark.parametrize(("version", "name"), assembling.cases(list(VARIANTS)))
def test_machine_code(bounds, version, name):
    report, variant = assembling.reports(version, "variants8")[name], VARIANTS[name]
    assert report["tensor"] >= 4, "a slice of 128 inputs takes four instructions"
    if variant.dtype == "int8":
        assert report["drains"] == 0
    assert report["shared"] <= SHARED_MEMORY
    assembling.check(report, bounds[name])


@pytest.mark.slow
@pytest.mark.parametrize("version", assembling.VERSIONS)
def test_shared_memory_is_what_the_config_says(version):
    """`shared_bytes` is checked before anything is compiled: it must not promise too much."""
    found = assembling.reports(version, "variants8")
    for name, variant in list(VARIANTS.items())[:: assembling.EVERY[version]]:
        assert found[name]["shared"] <= variant.config.shared_bytes() + BARRIERS, name


if __name__ == "__main__":
    assembling.record(BOUNDS, "variants8")
