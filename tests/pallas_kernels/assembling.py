"""Machine code of the kernels as each supported JAX compiles it, and the bounds recorded for it."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
from collections.abc import Sequence

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSIONS = ("0.11", "0.12")
# The first compiles every variant, the others some: what differs between them shows in any.
EVERY = {"0.11": 1, "0.12": 6}


def compiler(version: str) -> pathlib.Path:
    return ROOT / f".venv-sass-{version}" / "bin" / "python"


def printed(version: str, program: str, *arguments: str) -> dict[str, dict]:
    """Variant's name -> what a program of this folder prints of it; skips without a compiler."""
    if os.environ.get("JAXQ_NO_SASS") == "1" or not compiler(version).exists():
        pytest.skip(f"no compiler of JAX {version}: scripts/sass_check makes it")
    done = subprocess.run(
        [compiler(version), pathlib.Path(__file__).with_name(program), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


def cases(names: Sequence[str]) -> list[tuple[str, str]]:
    """(version, variant's name) of what is compiled of a suite."""
    return [(version, name) for version in VERSIONS for name in names[:: EVERY[version]]]


@functools.cache
def reports(version: str, suite: str, every: int | None = None) -> dict[str, dict]:
    """Variant's name -> what the assembler made of it (see `sass`); `every`: other than `EVERY`."""
    some = str(EVERY[version] if every is None else every)
    return printed(version, "sass.py", "--suite", suite, "--every", some)


def check(report: dict, bound: list[float]) -> None:
    """What holds for every kernel: all stays in registers, and no more than was recorded."""
    assert report["spills"] == report["stack"] == 0, report
    assert report["warnings"] == [], "the assembler serialized the tensor cores"
    assert report["forbidden"] == [], report
    registers, slots = bound
    assert report["registers"] <= registers, report
    assert report["slots"] <= slots, report


def bounds_of(name: str) -> pathlib.Path:
    """File with [registers, slots] by variant's name."""
    return pathlib.Path(__file__).with_name(name)


def read(path: pathlib.Path) -> dict[str, list[float]]:
    return json.loads(path.read_text())


def record(path: pathlib.Path, suite: str) -> None:
    """The worst of all versions' figures becomes the bound."""
    found = [reports(version, suite, 1) for version in VERSIONS]
    worst = {
        name: [max(r[name][key] for r in found) for key in ("registers", "slots")]
        for name in found[0]
    }
    lines = (f'  "{name}": {json.dumps(figures)}' for name, figures in worst.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
