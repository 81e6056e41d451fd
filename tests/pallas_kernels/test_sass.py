"""The kernels' machine code for Hopper, as each supported JAX compiles it: no GPU is needed.

Bounds are recorded in sass_bounds.json, as [registers, instructions per tile].  After a change that
makes the code cheaper, or a new variant, record them again with

    python -m tests.pallas_kernels.test_sass
"""

import json
import os
import pathlib
import subprocess

import pytest

from jq.pallas_kernels.config import SHARED_MEMORY
from tests.pallas_kernels import variants

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOUNDS = pathlib.Path(__file__).with_name("sass_bounds.json")
VERSIONS = ("0.11", "0.12")


def compiler(version: str) -> pathlib.Path:
    return ROOT / f".venv-sass-{version}" / "bin" / "python"


def reports(version: str) -> dict[str, dict]:
    """Variant's name -> what the assembler made of it."""
    done = subprocess.run(
        [compiler(version), ROOT / "tests" / "pallas_kernels" / "sass.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module", params=VERSIONS)
def assembled(request) -> dict[str, dict]:
    if os.environ.get("JAXQ_NO_SASS") == "1" or not compiler(request.param).exists():
        pytest.skip(f"no compiler of JAX {request.param}: scripts/sass_check makes it")
    return reports(request.param)


@pytest.fixture(scope="module")
def bounds() -> dict[str, list[float]]:
    return json.loads(BOUNDS.read_text())


def test_every_variant_has_bounds(bounds):
    assert set(bounds) == {variant.name for variant in variants.ALL}


def test_the_bounds_leave_time_for_the_memory(bounds):
    """At an H200's full bandwidth a multiprocessor gets a tile every 124 clock cycles."""
    for name, (_, slots) in bounds.items():
        if name.startswith("decode"):
            assert slots <= 90, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [variant.name for variant in variants.ALL])
def test_machine_code(assembled, bounds, name):
    report = assembled[name]
    assert report["tensor"] >= 8, "wgmma takes the operands in two slices of four instructions"
    assert report["drains"] == 0
    assert report["spills"] == report["stack"] == 0
    assert report["warnings"] == [], "the assembler serialized wgmma"
    assert report["forbidden"] == []
    assert report["shared"] <= SHARED_MEMORY
    registers, slots = bounds[name]
    assert report["registers"] <= registers
    assert report["slots"] <= slots


@pytest.mark.slow
def test_shared_memory_is_what_the_config_says(assembled):
    """`shared_bytes` is checked before anything is compiled: it must not promise too much."""
    for variant in variants.ALL:
        shared = assembled[variant.name]["shared"]
        assert shared <= variant.config.shared_bytes() + 1024, variant.name


def record() -> None:
    """The worst of all versions' figures becomes the bound."""
    found = [reports(version) for version in VERSIONS]
    worst = {
        variant.name: [max(r[variant.name][key] for r in found) for key in ("registers", "slots")]
        for variant in variants.ALL
    }
    lines = (f'  "{name}": {json.dumps(figures)}' for name, figures in worst.items())
    BOUNDS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
