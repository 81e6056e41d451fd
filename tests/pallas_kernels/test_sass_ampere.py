"""The kernels' machine code for Ampere and Ada, as each supported JAX compiles it, without a GPU.

Bounds are recorded in sass_bounds_sm80.json and so on, as [registers, instructions for four of the
tensor cores'].  After a change that makes the code cheaper, or a new variant, record them again:

    python -m tests.pallas_kernels.test_sass_ampere
"""

import pytest

from jq.pallas_kernels.ampere import tuning
from jq.pallas_kernels.ampere.config import SHARED_MEMORY, SPARE
from tests.pallas_kernels import assembling, variants_ampere

FAMILIES = {
    (8, 0): ("variants_sm80", variants_ampere.SM80),
    (8, 6): ("variants_sm86", variants_ampere.SM86),
    (8, 9): ("variants_sm89", variants_ampere.SM89),
}
ALL = [
    pytest.param(version, capability, variant, id=f"{version}-{capability[1]}-{variant.name}")
    for capability, (_, variants) in FAMILIES.items()
    for version in assembling.VERSIONS
    for variant in variants[:: assembling.EVERY[version]]
]
# 65536 registers of a multiprocessor make room for two blocks of 128 threads at least.
MOST_REGISTERS = 255


def bounds_of(capability):
    return assembling.bounds_of(f"sass_bounds_sm{capability[0]}{capability[1]}.json")


@pytest.mark.parametrize("capability", FAMILIES)
def test_every_variant_has_bounds(capability):
    names = {variant.name for variant in FAMILIES[capability][1]}
    assert set(assembling.read(bounds_of(capability))) == names


def code(config):
    """What of a config decides about the loop's code."""
    return type(config), config.block_m, config.block_n, config.slices


def test_what_the_estimate_answers_is_assembled():
    """For the eldest family, whose memory takes every candidate; and float8 for the one it has."""
    everything = {code(config) for config in (*tuning.W4_CANDIDATES, *tuning.W8_CANDIDATES)}
    assert everything == {code(variant.config) for variant in variants_ampere.SM80}
    eight = {code(c) for c in tuning.W8_CANDIDATES if c.block_m <= 64}
    assert eight == {
        code(v.config)
        for v in variants_ampere.SM89
        if getattr(v, "dtype", "") == variants_ampere.FP8
    }


@pytest.mark.slow
@pytest.mark.parametrize(("version", "capability", "variant"), ALL)
def test_machine_code(version, capability, variant):
    report = assembling.reports(version, FAMILIES[capability][0])[variant.name]
    assert report["tensor"] >= 4
    shared = report["shared"]
    assert shared <= SHARED_MEMORY[capability]
    # What is checked before anything is compiled must not promise too much.
    assert shared <= variant.config.shared_bytes() + SPARE
    bound = assembling.read(bounds_of(capability))[variant.name]
    assembling.check(report, bound)
    assert bound[0] <= MOST_REGISTERS


if __name__ == "__main__":
    for family, (name, _) in FAMILIES.items():
        assembling.record(bounds_of(family), name)
